"""Sequence parallelism: the tokens of a video are sharded over the processes of `diffsynth.core.parallel`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from math import gcd
from typing import ClassVar

import torch
from jaxtyping import Float
from torch import Tensor

from diffsynth.core.parallel import MeshAxis, all_gather_shards, shard_slice, ulysses_attention
from diffsynth_wan.extension import Extension, Network, Stream, TokenScope


def with_sharded_tokens(extensions: Sequence[Extension], axis: MeshAxis) -> tuple[Extension, ...]:
    """Return a tuple of `extensions` with a `ShardTokens` inserted after those of scope "whole" and before those of
    scope "part"; unchanged for one process.

    Raises:
        ValueError: an extension has no `token_scope`, or one of scope "whole" follows one of scope "part".
    """
    if axis.size == 1:
        return tuple(extensions)
    whole: list[Extension] = []
    part: list[Extension] = []
    for extension in extensions:
        name = getattr(extension, "__name__", type(extension).__name__)
        scope = getattr(extension, "token_scope", None)
        if scope not in ("whole", "part"):
            raise ValueError(
                f"{name} cannot run with tokens sharded over {axis.size} processes: token_scope is {scope!r}, "
                f"expected 'whole' or 'part'; use one process, or parallel(cfg=2)"
            )
        if scope == "whole" and part:
            raise ValueError(f"{name} needs the whole stream; it must come before {type(part[0]).__name__}")
        (whole if scope == "whole" else part).append(extension)
    return (*whole, ShardTokens(axis), *part)


@dataclass(frozen=True, eq=False)
class ShardTokens:
    """Extension that leaves in the stream the tokens of this process; self-attention still covers all tokens.

    Extensions before it may change the number of tokens, their positions and the self-attention, which then gets all
    tokens of some heads. Extensions after it take this process's part of what they add with `Stream.split`.
    """

    axis: MeshAxis
    token_scope: ClassVar[TokenScope] = "whole"

    def __call__(self, dit: Network, stream: Stream) -> Stream:
        """Return the stream of this process; see `Extension`.

        Raises:
            ValueError: there are fewer tokens than processes.
        """
        total, axis = stream.tokens.shape[1], self.axis
        if total < axis.size:
            raise ValueError(f"{total} tokens cannot be sharded over {axis.size} processes; generate a larger video")
        own = shard_slice(total, axis)

        def split(x: Tensor) -> Tensor:
            return x[:, own].contiguous()

        cos, sin = stream.rotary
        return replace(
            stream,
            tokens=split(stream.tokens),
            rotary=(split(cos), split(sin)),
            time=local_groups(stream.time, own, total),
            modulation=local_groups(stream.modulation, own, total),
            attend=lambda block: ulysses_attention(stream.attend(block), total, axis),
            split=split,
            join=partial(all_gather_shards, total=total, axis=axis),
            first_token=own.start,
        )


def local_groups(x: Float[Tensor, "b g ..."], own: slice, total: int) -> Float[Tensor, "b g_own ..."]:
    """Return a tensor `b g_own ...` of the entries of `x` for the tokens in `own`: a single one if they lie in one
    group, else one per piece of equal length, repeated for a group of several pieces. `x` has one entry along axis 1
    for each of `g` equal groups of consecutive tokens.

    `x` has one row for each of `g` equal groups of the `total` tokens. If `own` starts or ends inside a group, all
    groups are cut into the longest pieces that fit both.
    """
    length = total // x.shape[1]
    if own.start // length == (own.stop - 1) // length:
        return x[:, own.start // length : own.start // length + 1]
    piece = gcd(length, own.start, own.stop)
    return x[:, torch.arange(own.start, own.stop, piece, device=x.device) // length]
