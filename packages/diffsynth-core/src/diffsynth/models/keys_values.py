"""Keys and values that the blocks of a transformer attend to besides those of their own tokens.

`MoreKeysValues` is an extension of networks whose `Stream` has the field `attend`: a function of a block's stack and
index that returns the block's attention, a function of queries, keys, values and, where the network has one, a mask.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, TypeAlias

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor

Attend: TypeAlias = Callable[..., Float[Tensor, "b s n d"]]
"""Function of a block's queries, keys and values, `b s n d`, and a mask if there is one, that returns the attention
output."""


@dataclass(frozen=True, eq=False)
class MoreKeysValues:
    """Extension in which blocks attend also to keys and values that are given.

    Args:
        blocks: (stack, index) of a block -> keys, after norm and RoPE, and values, each of one item or of the batch.
            Blocks that are not in it attend as before.
    """

    blocks: Mapping[tuple[str, int], Sequence[Float[Tensor, "#b s n d"]]]

    def __call__(self, network: Any, stream: Any) -> Any:
        """Return the stream whose blocks attend to more.

        Args:
            network: the transformer; it is not used.
            stream: a frozen dataclass with the field `attend`.
        """
        attend = stream.attend

        def attend_also(block: tuple[str, int]) -> Attend:
            return partial(_attend_also, attend(block), *self.blocks[block]) if block in self.blocks else attend(block)

        return replace(stream, attend=attend_also)


# It takes tensors, and looks up nothing by block: a compiled block is then compiled once for all blocks.
def _attend_also(
    attend: Attend,
    keys: Tensor,
    values: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Bool[Tensor, "#b #n #s s"] | None = None,
) -> Tensor:
    """Return the attention output of `q` over `k` and `keys`; all tokens attend to `keys`, whatever the mask is."""
    length = keys.shape[1]
    keys, values = (x.expand(len(q), -1, -1, -1) for x in (keys, values))
    k, v = torch.cat((k, keys), dim=1), torch.cat((v, values), dim=1)
    return attend(q, k, v) if mask is None else attend(q, k, v, F.pad(mask, (0, length), value=True))
