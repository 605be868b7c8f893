"""What processes pass to each other. For drawing only: nothing here has a gradient, and who asks for one is refused."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from math import prod
from typing import TypeAlias

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, distributed

from diffsynth.core.parallel.mesh import MeshAxis
from diffsynth.errors import Refused

Attend: TypeAlias = Callable[
    [Float[Tensor, "b s n d"], Float[Tensor, "b s n d"], Float[Tensor, "b s n d"]], Float[Tensor, "b s n d"]
]


def shares(total: int, size: int) -> tuple[int, ...]:
    """How many of `total` things each of `size` processes has: they differ by one at most, the first have more."""
    return tuple(total // size + (index < total % size) for index in range(size))


def share(total: int, ranks: MeshAxis) -> slice:
    """Which of `total` things are this process's."""
    sizes = shares(total, ranks.size)
    start = sum(sizes[: ranks.index])
    return slice(start, start + sizes[ranks.index])


def join_shares(x: Float[Tensor, "b s_own ..."], total: int, ranks: MeshAxis) -> Float[Tensor, "b s ..."]:
    """The whole along axis 1, in every process, from the `share` that each one has.

    Raises:
        Refused: a gradient is wanted.
    """
    if ranks.size == 1:
        return x
    _refuse_gradient(x)
    sizes = shares(total, ranks.size)
    # All processes must send as much: the shorter shares get one token more, which is cut off again.
    missing = sizes[0] - x.shape[1]
    sent = F.pad(x, (0, 0) * (x.ndim - 2) + (0, missing)) if missing else x
    given = [torch.empty_like(sent, memory_format=torch.contiguous_format) for _ in sizes]
    distributed.all_gather(given, sent.contiguous(), group=ranks.group)
    return torch.cat([part[:, :size] for part, size in zip(given, sizes, strict=True)], dim=1)


def attend_together(attend: Attend, tokens: int, ranks: MeshAxis) -> Attend:
    """Self-attention of processes that each have a `share` of the tokens, all heads of them.

    Before it they trade tokens for heads, and behind it back (DeepSpeed-Ulysses, Jacobs et al. 2023,
    arXiv:2309.14509). So `attend` sees all tokens of some heads, and may be whatever does not mix heads. Neither tokens
    nor heads need divide by the number of processes; a process without a head does nothing meanwhile.

    Args:
        attend: of queries, keys and values of equally many heads.
        tokens: of all processes together.
        ranks: they.
    """
    sizes = shares(tokens, ranks.size)

    def together(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        if not q.shape == k.shape == v.shape:
            raise ValueError(
                f"queries {tuple(q.shape)}, keys {tuple(k.shape)}, values {tuple(v.shape)}: expected one shape to share"
            )
        _refuse_gradient(q, k, v)
        batch, own, heads, dim = q.shape
        heads_of = shares(heads, ranks.size)
        given = _trade(
            torch.stack((q, k, v)).split(heads_of, dim=3),
            [(3, batch, size, heads_of[ranks.index], dim) for size in sizes],
            ranks,
        )
        q, k, v = torch.cat(given, dim=2)
        read = attend(q, k, v) if q.shape[2] else q
        given = _trade(read.split(sizes, dim=1), [(batch, own, some, dim) for some in heads_of], ranks)
        return torch.cat(given, dim=2)

    return together


def compute_each(names: Sequence[str], compute: Callable[[str], Tensor], ranks: MeshAxis) -> list[Tensor]:
    """`[compute(name) for name in names]`, where process `i` computes the `i`-th; results are of one shape.

    One process computes all.
    """
    if ranks.size == 1:
        return [compute(name) for name in names]
    assert len(names) == ranks.size, "a name for each process"
    own = compute(names[ranks.index]).contiguous()
    _refuse_gradient(own)
    given = [torch.empty_like(own) for _ in names]
    distributed.all_gather(given, own, group=ranks.group)
    return given


def _trade(pieces: Sequence[Tensor], shapes: Sequence[tuple[int, ...]], ranks: MeshAxis) -> list[Tensor]:
    """Send the `i`-th piece to process `i`; what each sent in return, of these shapes."""
    sent = torch.cat([piece.reshape(-1) for piece in pieces])
    counts = [prod(shape) for shape in shapes]
    given = sent.new_empty(sum(counts))
    distributed.all_to_all_single(
        given,
        sent,
        output_split_sizes=counts,
        input_split_sizes=[piece.numel() for piece in pieces],
        group=ranks.group,
    )
    return [flat.view(shape) for flat, shape in zip(given.split(counts), shapes, strict=True)]


def _refuse_gradient(*tensors: Tensor) -> None:
    if torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors):
        raise Refused("several processes share this call, and what they exchange has no gradient; train without that")
