"""Sliding windows: a long video is denoised in overlapping windows of latent frames, blended in every step."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from diffsynth.core.arguments import check_integer


@dataclass(frozen=True)
class Window:
    """Latent frames `start` to `stop` (exclusive) of a video, together with all prefix frames.

    Args:
        start, stop: indices counted from the first frame of the video, which is frame `prefix_frames` of the latents.
        fade_in, fade_out: number of frames at each end over which the weight of the window ramps up or down.
        prefix_frames: frames before the video, such as reference images; they are part of every window.
    """

    start: int
    stop: int
    fade_in: int = 0
    fade_out: int = 0
    prefix_frames: int = 0

    @property
    def frames(self) -> tuple[int, ...]:
        """Tuple of the indices, in the latents, of the window's latent frames: the prefix frames (before the video),
        then its own.
        """
        prefix = self.prefix_frames
        return (*range(prefix), *range(prefix + self.start, prefix + self.stop))

    def cut(self, x: Tensor, dim: int = 2) -> Tensor:
        """Return a tensor: the prefix frames and the window's frames of `x`, whose axis `dim` is latent frames; fewer
        if `x` ends earlier.
        """
        prefix = self.prefix_frames
        video = x.narrow(dim, prefix, max(x.shape[dim] - prefix, 0)) if prefix else x
        start = min(self.start, video.shape[dim])
        video = video.narrow(dim, start, min(self.stop, video.shape[dim]) - start)
        return torch.cat([x.narrow(dim, 0, prefix), video], dim=dim) if prefix else video

    def weights(self) -> Float[Tensor, "t"]:
        """Return an fp32 tensor `t` with the blending weight of each latent frame: 1, with linear ramps where the
        window overlaps another.
        """
        index = torch.arange(self.stop - self.start, dtype=torch.float32) + 0.5
        ramps = torch.minimum(index / max(self.fade_in, 0.5), index.flip(0) / max(self.fade_out, 0.5)).clamp(max=1)
        return torch.cat([torch.ones(self.prefix_frames), ramps])


@dataclass(frozen=True)
class SlidingWindow:
    """Size and stride of the windows of a call.

    Args:
        size, stride: latent frames of a window, and from the start of one to the next; the difference is the overlap.
        prefix_frames: latent frames before the video.

    Raises:
        ValueError: a size or stride that is no positive integer, a stride that leaves gaps, or a negative number of
            prefix frames.
    """

    size: int
    stride: int
    prefix_frames: int = 0

    def __post_init__(self) -> None:
        for name in ("size", "stride"):
            check_integer(name, getattr(self, name), least=1)
        check_integer("prefix_frames", self.prefix_frames, least=0)
        if self.stride > self.size:
            raise ValueError(
                f"sliding_window_stride={self.stride} is larger than sliding_window_size={self.size} and leaves gaps"
            )

    @classmethod
    def from_arguments(cls, size: int | None, stride: int | None, *, prefix_frames: int = 0) -> SlidingWindow | None:
        """Return a `SlidingWindow` of `size` and `stride`, in latent frames; None if both are None, ValueError if only
        one is.

        Raises:
            ValueError: only one of them is given, one is no positive integer, or the stride leaves gaps.
        """
        if size is None and stride is None:
            return None
        note = "it counts latent frames; give both sliding_window_size and sliding_window_stride, or neither"
        for name, value in (("sliding_window_size", size), ("sliding_window_stride", stride)):
            check_integer(name, value, least=1, note=note)
        assert size is not None
        assert stride is not None
        return cls(size, stride, prefix_frames)

    def windows(self, frames: int) -> list[Window]:
        """Return a list of the `Window`s that cover `frames` latent frames, prefix frames not counted, in order; the
        last may be shorter.

        The last window may be shorter than `size`. A single window has no ramps.
        """
        overlap, windows = self.size - self.stride, []
        for start in range(0, frames, self.stride):
            is_last = start + self.size >= frames
            stop = min(start + self.size, frames)
            windows.append(Window(start, stop, overlap if start else 0, 0 if is_last else overlap, self.prefix_frames))
            if is_last:
                break
        return windows


def blend_windows(
    velocity: Callable[[Float[Tensor, "b c t_window h w"], Window], Float[Tensor, "b c t_window h w"]],
    windows: Sequence[Window],
    latents: Float[Tensor, "b c t h w"],
) -> Float[Tensor, "b c t h w"]:
    """Return a tensor `b c t h w`: per frame, the weighted mean of `velocity` over the windows that have the frame.

    Windows run one after another and sums are fp32, so memory does not grow with the number of windows. The result has
    the dtype of `latents`.

    Args:
        velocity: function of the latents of a window and the window, which returns their velocity.
        windows: that cover all frames.
        latents: of the whole video, with its prefix frames.
    """
    total = latents.new_zeros(latents.shape, dtype=torch.float32)
    weight = total.new_zeros(latents.shape[2], 1, 1)
    for window in windows:
        prefix = window.prefix_frames
        weights = window.weights().to(latents.device)[:, None, None]
        part = velocity(window.cut(latents), window).float() * weights
        video = slice(prefix + window.start, prefix + window.stop)
        for target, source in ((slice(prefix), slice(prefix)), (video, slice(prefix, None))):
            total[:, :, target] += part[:, :, source]
            weight[target] += weights[source]
    return (total / weight).to(latents.dtype)
