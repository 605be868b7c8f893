"""Communication between the processes of a mesh axis. For inference only: with gradients these functions raise."""

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


def shard_sizes(total: int, size: int) -> tuple[int, ...]:
    """Return a tuple of `size` ints, the numbers of elements of each process: equal shares of `total`, with one more in
    each of the first `total % size`.
    """
    return tuple(total // size + (index < total % size) for index in range(size))


def shard_slice(total: int, axis: MeshAxis) -> slice:
    """Return the `slice` of the consecutive indices from 0 to `total - 1` that belong to this process, by its position
    along `axis`.
    """
    sizes = shard_sizes(total, axis.size)
    start = sum(sizes[: axis.index])
    return slice(start, start + sizes[axis.index])


def all_gather_shards(x: Float[Tensor, "b s_own ..."], total: int, axis: MeshAxis) -> Float[Tensor, "b s ..."]:
    """Return one tensor, equal in every process: the shards `x` of all processes, in order, joined along axis 1 to
    `total` elements; a single process returns `x`.

    Args:
        x: the shard of this process, see `shard_slice`.
        total: elements of all shards.
        axis: the processes that have the shards.

    Raises:
        Refused: a gradient is needed.
    """
    if axis.size == 1:
        return x
    _refuse_gradient(x)
    sizes = shard_sizes(total, axis.size)
    # all_gather needs equal sizes: shorter shards are padded by one element, which is removed again.
    missing = sizes[0] - x.shape[1]
    padded = F.pad(x, (0, 0) * (x.ndim - 2) + (0, missing)) if missing else x
    gathered = [torch.empty_like(padded, memory_format=torch.contiguous_format) for _ in sizes]
    distributed.all_gather(gathered, padded.contiguous(), group=axis.group)
    return torch.cat([shard[:, :size] for shard, size in zip(gathered, sizes, strict=True)], dim=1)


def ulysses_attention(attend: Attend, tokens: int, axis: MeshAxis) -> Attend:
    """Return a function (queries, keys, values) -> output, all of shape (batch, own tokens, heads, head size), that
    computes self-attention over the tokens of all processes, each of which passes and gets only its own tokens.

    Queries, keys, values and the output of each process have its own tokens and all heads.

    DeepSpeed-Ulysses (Jacobs et al. 2023, arXiv:2309.14509): an all-to-all before attention exchanges shards of tokens
    for shards of heads, and one after it exchanges them back. `attend` gets all tokens of some heads, and may be any
    function that treats heads separately. The numbers of tokens and heads need not be divisible by the number of
    processes; a process without heads skips `attend`.

    Args:
        attend: attention over queries, keys and values with the same number of heads.
        tokens: number of tokens of all processes.
        axis: the processes that share the tokens.
    """
    sizes = shard_sizes(tokens, axis.size)

    def distributed_attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        if not q.shape == k.shape == v.shape:
            raise ValueError(
                f"queries {tuple(q.shape)}, keys {tuple(k.shape)}, values {tuple(v.shape)}: expected equal shapes"
            )
        _refuse_gradient(q, k, v)
        batch, own, heads, dim = q.shape
        heads_of = shard_sizes(heads, axis.size)
        received = _all_to_all(
            torch.stack((q, k, v)).split(heads_of, dim=3),
            [(3, batch, size, heads_of[axis.index], dim) for size in sizes],
            axis,
        )
        q, k, v = torch.cat(received, dim=2)
        out = attend(q, k, v) if q.shape[2] else q
        received = _all_to_all(out.split(sizes, dim=1), [(batch, own, some, dim) for some in heads_of], axis)
        return torch.cat(received, dim=2)

    return distributed_attend


def compute_and_gather(names: Sequence[str], compute: Callable[[str], Tensor], axis: MeshAxis) -> list[Tensor]:
    """Return the list `[compute(name) for name in names]` in every process; process `i` computes the `i`-th item only,
    a single process all.

    A single process computes all of them.

    Args:
        names: one for each process.
        compute: name -> tensor; the results have one shape.
        axis: the processes.

    Raises:
        Refused: a gradient is needed.
    """
    if axis.size == 1:
        return [compute(name) for name in names]
    assert len(names) == axis.size, "one name for each process"
    own = compute(names[axis.index]).contiguous()
    _refuse_gradient(own)
    gathered = [torch.empty_like(own) for _ in names]
    distributed.all_gather(gathered, own, group=axis.group)
    return gathered


def _all_to_all(sent: Sequence[Tensor], shapes: Sequence[tuple[int, ...]], axis: MeshAxis) -> list[Tensor]:
    """Send tensor `sent[i]` to process `i`, and return the list of received tensors, the `i`-th from process `i` and of
    shape `shapes[i]`.
    """
    flat = torch.cat([tensor.reshape(-1) for tensor in sent])
    counts = [prod(shape) for shape in shapes]
    received = flat.new_empty(sum(counts))
    distributed.all_to_all_single(
        received,
        flat,
        output_split_sizes=counts,
        input_split_sizes=[tensor.numel() for tensor in sent],
        group=axis.group,
    )
    return [each.view(shape) for each, shape in zip(received.split(counts), shapes, strict=True)]


def _refuse_gradient(*tensors: Tensor) -> None:
    if torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors):
        raise Refused(
            "several processes share this call, and their communication has no gradient; train without pipe.parallel()"
        )
