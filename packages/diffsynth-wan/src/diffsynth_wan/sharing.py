"""The tokens of a video, shared out among the processes of `diffsynth.core.parallel`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from math import gcd
from typing import TYPE_CHECKING, ClassVar

import torch
from jaxtyping import Float
from torch import Tensor

from diffsynth.core.parallel import MeshAxis, all_gather_shards, shard_slice, ulysses_attention
from diffsynth_wan.extension import Extension, Sees, Stream

if TYPE_CHECKING:
    from diffsynth_wan.dit import WanDiT


def shared_out(extensions: Sequence[Extension], axis: MeshAxis) -> tuple[Extension, ...]:
    """The same extensions, and between those that see the whole stream and those that see a part, `ShareTokens`.

    Raises:
        ValueError: an extension does not say what it sees, or sees the whole and stands behind one that sees a part.
    """
    if axis.size == 1:
        return tuple(extensions)
    whole: list[Extension] = []
    part: list[Extension] = []
    for extension in extensions:
        name = getattr(extension, "__name__", type(extension).__name__)
        sees = getattr(extension, "sees", None)
        if sees not in ("whole", "part"):
            raise ValueError(
                f"{name} cannot be shared among {axis.size} processes: it does not say what it sees, "
                f"sees='whole' or sees='part' of the tokens; draw in one process, or with parallel(cfg=2)"
            )
        if sees == "whole" and part:
            raise ValueError(f"{name} sees the whole stream; it must stand before {type(part[0]).__name__}")
        (whole if sees == "whole" else part).append(extension)
    return (*whole, ShareTokens(axis), *part)


@dataclass(frozen=True, eq=False)
class ShareTokens:
    """From here on the stream has the tokens of this process; its self-attention is that of all processes together.

    Behind it, extensions read tokens of their own through `Stream.split`; before it they may change how many there
    are, where they stand, and how they attend: to all tokens, in some heads.
    """

    axis: MeshAxis
    sees: ClassVar[Sees] = "whole"

    def __call__(self, dit: WanDiT, stream: Stream) -> Stream:
        """See `Extension`.

        Raises:
            ValueError: fewer tokens than processes.
        """
        total, axis = stream.tokens.shape[1], self.axis
        if total < axis.size:
            raise ValueError(f"{total} tokens cannot be shared among {axis.size} processes; draw a larger video")
        own = shard_slice(total, axis)

        def split(x: Tensor) -> Tensor:
            return x[:, own].contiguous()

        cos, sin = stream.rotary
        return replace(
            stream,
            tokens=split(stream.tokens),
            rotary=(split(cos), split(sin)),
            time=runs_of(stream.time, own, total),
            modulation=runs_of(stream.modulation, own, total),
            attend=lambda block: ulysses_attention(stream.attend(block), total, axis),
            split=split,
            join=partial(all_gather_shards, total=total, axis=axis),
            first=own.start,
        )


def runs_of(x: Float[Tensor, "b g ..."], own: slice, total: int) -> Float[Tensor, "b g_own ..."]:
    """What belongs to the tokens in `own`, again in equal runs, from what belongs to `g` equal runs of `total` tokens.

    A run that two processes share is cut, and all others with it, into the longest pieces that fit both.
    """
    run = total // x.shape[1]
    if own.start // run == (own.stop - 1) // run:
        return x[:, own.start // run : own.start // run + 1]
    piece = gcd(run, own.start, own.stop)
    return x[:, torch.arange(own.start, own.stop, piece, device=x.device) // run]
