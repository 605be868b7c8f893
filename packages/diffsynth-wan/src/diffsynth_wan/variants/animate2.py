"""Wan-Animate-2: a character moves as a reference video does.

The network first reads the reference video, clean, and keeps its keys and values. Then each frame of the new video
attends to the whole of it and to its own frame of the reference. There are no parameters beside the network's.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from typing import TYPE_CHECKING, ClassVar

import torch
from jaxtyping import Float
from torch import Tensor

from diffsynth.core.attention import attention
from diffsynth_wan.extension import Attend, Sees, Stream

if TYPE_CHECKING:
    from diffsynth_wan.dit import WanDiT
    from diffsynth_wan.windows import Window

REFERENCE_TIME = 0.001
"""Sigma of the pass over the reference video."""

SKIPPED_BLOCKS = frozenset({9})
"""Left out of the pass without a prompt, which makes guidance stronger; for `FollowReference`."""


@dataclass(eq=False)
class ReferenceVideo:
    """Keys and values of a reference video, kept by `ReadReference` and given to `FollowReference`.

    Args:
        offload: keep them on the CPU, a block at a time on the device. In bf16, those of 81 frames of
            720p take 62 GB.
    """

    offload: bool = False
    blocks: dict[int, tuple[Tensor, Tensor]] = field(default_factory=dict)

    def keep(self, block: int, k: Float[Tensor, "b s n d"], v: Float[Tensor, "b s n d"]) -> None:
        """Of one block, turned to where the reference stands."""
        self.blocks[block] = (k.cpu(), v.cpu()) if self.offload else (k, v)

    def of(self, block: int, device: torch.device) -> tuple[Float[Tensor, "b s n d"], Float[Tensor, "b s n d"]]:
        """What was kept.

        Raises:
            ValueError: nothing was.
        """
        if block not in self.blocks:
            raise ValueError(
                f"block {block} of the reference video was not read; run the pass with ReadReference first"
            )
        k, v = self.blocks[block]
        # A copy is one on meta, too, where a plan counts what is on the device.
        how = {"non_blocking": True, "copy": self.offload}
        return k.to(device, **how), v.to(device, **how)


@dataclass(frozen=True, eq=False)
class ReadReference:
    """This pass reads a reference video, at `REFERENCE_TIME`; its output is of no account.

    It stands one frame later than the new video, and beside it along the width.
    """

    video: ReferenceVideo
    sees: ClassVar[Sees] = "whole"

    def __call__(self, dit: WanDiT, stream: Stream) -> Stream:
        """See `Extension`."""
        time, height, width = stream.positions
        beside = tuple(column + len(width) for column in width)
        stream = dit.place(stream, (tuple(frame + 1 for frame in time), height, beside))
        return replace(stream, attend=lambda block: partial(self._attend, block, stream.attend(block)))

    def _attend(self, block: int, attend: Attend, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        self.video.keep(block, k, v)
        return attend(q, k, v)


@dataclass(frozen=True, eq=False)
class FollowReference:
    """The new video: frame 0 is the character's image, frame `i` follows frame `i - 1` of the reference.

    Args:
        video: what `ReadReference` kept.
        log_scale: added to the scores of all tokens with those of frame 1, where the end of a clip before this one is
            given; below 0 they count for less. 0 for the model, -1.3 for the distilled one.
        skip_blocks: of the network.
        windows: of a long video: first frame of a window -> what `ReadReference` kept of its frames.
    """

    video: ReferenceVideo
    log_scale: float = 0.0
    skip_blocks: frozenset[int] = frozenset()
    windows: Mapping[int, ReferenceVideo] = field(default_factory=dict)
    sees: ClassVar[Sees] = "whole"

    def __call__(self, dit: WanDiT, stream: Stream) -> Stream:
        """See `Extension`."""
        frames, height, width = stream.grid
        return replace(
            stream,
            attend=lambda block: partial(self._attend, block, frames, height * width),
            skip_blocks=stream.skip_blocks | self.skip_blocks,
        )

    def in_window(self, window: Window) -> FollowReference:
        """What was read of its frames. Frame 0 is in front of every window, frame 1 in the first alone."""
        log_scale = 0.0 if window.start else self.log_scale
        return FollowReference(self.windows[window.start], log_scale, self.skip_blocks)

    def _attend(self, block: int, frames: int, per_frame: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        reference_k, reference_v = (x.expand(len(k), -1, -1, -1) for x in self.video.of(block, q.device))
        bias = self._bias(k, per_frame)
        read = []
        for frame, queries in enumerate(q.split(per_frame, dim=1)):
            # Before frame 1, and behind the end of the reference, there is nothing to follow.
            beside = slice(max(frame - 1, 0) * per_frame, frame * per_frame)
            keys = torch.cat((k, reference_k[:, beside]), dim=1)
            values = torch.cat((v, reference_v[:, beside]), dim=1)
            read.append(
                attention(queries, keys, values, score_bias=None if bias is None else bias[..., : keys.shape[1]])
            )
        return torch.cat(read, dim=1)

    def _bias(self, k: Tensor, per_frame: int) -> Tensor | None:
        """Of all keys that a frame may see, those of the reference at the end."""
        if self.log_scale == 0:
            return None
        bias = k.new_zeros(1, 1, 1, k.shape[1] + per_frame)
        bias[..., per_frame : 2 * per_frame] = self.log_scale
        return bias
