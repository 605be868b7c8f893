"""Wan-Animate-2: a character follows the motion of a reference video through shared self-attention.

One forward pass over the clean reference video records the keys and values of every block. In each denoising step, a
latent frame then attends to all frames of the new video and to its own frame of the reference. No parameters are
added to those of the network.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from typing import ClassVar

import torch
from jaxtyping import Float
from torch import Tensor

from diffsynth.core.attention import attention
from diffsynth.sampling.windows import Window
from diffsynth_wan.extension import Attend, Network, Stream, TokenScope

REFERENCE_TIME = 0.001
"""Sigma of the forward pass over the reference video."""

SKIPPED_BLOCKS = frozenset({9})
"""Blocks that the unconditional pass skips, which strengthens guidance; a value for `ReferenceAttention`."""


@dataclass(eq=False)
class ReferenceKVCache:
    """Keys and values of a reference video, written by `RecordReference` and read by `ReferenceAttention`.

    Args:
        offload: store them on the CPU and copy those of one block at a time to the device. In bf16, the cache of 81
            frames at 720 x 1280 takes 62 GB.
    """

    offload: bool = False
    blocks: dict[int, tuple[Tensor, Tensor]] = field(default_factory=dict)

    def store(self, block: int, k: Float[Tensor, "b s n d"], v: Float[Tensor, "b s n d"]) -> None:
        """Store the keys (after RoPE) and values of block `block` in this cache; on the CPU if `offload` is on."""
        self.blocks[block] = (k.cpu(), v.cpu()) if self.offload else (k, v)

    def fetch(self, block: int, device: torch.device) -> tuple[Float[Tensor, "b s n d"], Float[Tensor, "b s n d"]]:
        """Return (keys, values), two tensors `b s n d` on `device`, that were stored for block `block`.

        Raises:
            ValueError: the block was never stored.
        """
        if block not in self.blocks:
            raise ValueError(
                f"the cache has no keys and values of block {block}; run a forward pass with RecordReference first"
            )
        k, v = self.blocks[block]
        # `copy` makes a copy on the meta device, too, so that a memory plan counts what is on the device.
        how = {"non_blocking": True, "copy": self.offload}
        return k.to(device, **how), v.to(device, **how)


@dataclass(frozen=True, eq=False)
class RecordReference:
    """Extension for the forward pass over the reference video: it fills the cache; the output is not used.

    The reference is placed one frame later than the new video, and to the right of it along the width.
    """

    cache: ReferenceKVCache
    token_scope: ClassVar[TokenScope] = "whole"

    def __call__(self, dit: Network, stream: Stream) -> Stream:
        """Return the stream at the reference's positions, with recording self-attention; see `Extension`."""
        time, height, width = stream.positions
        shifted_width = tuple(column + len(width) for column in width)
        stream = dit.set_positions(stream, (tuple(frame + 1 for frame in time), height, shifted_width))
        return replace(stream, attend=lambda block: partial(self._attend, block, stream.attend(block)))

    def _attend(self, block: int, attend: Attend, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        self.cache.store(block, k, v)
        return attend(q, k, v)


@dataclass(frozen=True, eq=False)
class ReferenceAttention:
    """Extension for the new video: frame `i` also attends to frame `i - 1` of the reference.

    Frame 0 is the character's image and has no reference frame.

    Args:
        cache: keys and values of the reference, filled by `RecordReference`.
        log_scale: added to the attention scores of all tokens with those of frame 1, which holds the last frames of
            the previous clip; negative values weaken it. 0 for the base model, -1.3 for the distilled one.
        skip_blocks: indices of blocks that are skipped.
        window_caches: first frame of a window -> cache of the window's frames, for a long video.
    """

    cache: ReferenceKVCache
    log_scale: float = 0.0
    skip_blocks: frozenset[int] = frozenset()
    window_caches: Mapping[int, ReferenceKVCache] = field(default_factory=dict)
    token_scope: ClassVar[TokenScope] = "whole"

    def __call__(self, dit: Network, stream: Stream) -> Stream:
        """Return the stream with self-attention extended to the reference; see `Extension`."""
        _, height, width = stream.grid
        return replace(
            stream,
            attend=lambda block: partial(self._attend, block, height * width),
            skip_blocks=stream.skip_blocks | self.skip_blocks,
        )

    def in_window(self, window: Window) -> ReferenceAttention:
        """Return a `ReferenceAttention` with the cache of the frames of `window`, and a `log_scale` of 0 unless it is
        the first window.

        Every window has frame 0. Only the first one has frame 1 of the video, so only there `log_scale` applies.
        """
        log_scale = 0.0 if window.start else self.log_scale
        return ReferenceAttention(self.window_caches[window.start], log_scale, self.skip_blocks)

    def _attend(self, block: int, per_frame: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        reference_k, reference_v = (x.expand(len(k), -1, -1, -1) for x in self.cache.fetch(block, q.device))
        bias = self._score_bias(k, per_frame)
        outputs = []
        for frame, queries in enumerate(q.split(per_frame, dim=1)):
            # Frame 0, and frames after the end of the reference, get an empty slice.
            own = slice(max(frame - 1, 0) * per_frame, frame * per_frame)
            keys = torch.cat((k, reference_k[:, own]), dim=1)
            values = torch.cat((v, reference_v[:, own]), dim=1)
            outputs.append(
                attention(queries, keys, values, score_bias=None if bias is None else bias[..., : keys.shape[1]])
            )
        return torch.cat(outputs, dim=1)

    def _score_bias(self, k: Tensor, per_frame: int) -> Tensor | None:
        """Return a score bias `1 1 1 n`, `log_scale` at the second frame's keys, else 0; None if `log_scale` is 0.

        `n` is the number of keys of `k` plus those of one frame; the caller cuts the bias to the keys that a query
        frame has.
        """
        if self.log_scale == 0:
            return None
        bias = k.new_zeros(1, 1, 1, k.shape[1] + per_frame)
        bias[..., per_frame : 2 * per_frame] = self.log_scale
        return bias
