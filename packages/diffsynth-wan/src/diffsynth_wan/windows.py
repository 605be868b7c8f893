"""Videos longer than the network can draw at once: overlapping windows of latent frames, blended in every step."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from diffsynth_wan.extension import FramesAt


@dataclass(frozen=True)
class Window:
    """Latent frames `start` to `stop` (behind the last) of the video, and all `lead` frames in front of it.

    Args:
        start, stop: counted from the first frame of the video, which is frame `lead` of the latents.
        rise, fall: frames at its two ends over which it fades.
        lead: frames in front of the video, such as reference images; every window sees them.
    """

    start: int
    stop: int
    rise: int = 0
    fall: int = 0
    lead: int = 0

    @property
    def frames(self) -> tuple[int, ...]:
        """Indices into the latents."""
        return (*range(self.lead), *range(self.lead + self.start, self.lead + self.stop))

    def cut(self, x: Tensor, dim: int = 2) -> Tensor:
        """These frames of a tensor that has all of the latents, along `dim`; fewer where it ends before."""
        video = x.narrow(dim, self.lead, max(x.shape[dim] - self.lead, 0)) if self.lead else x
        start = min(self.start, video.shape[dim])
        video = video.narrow(dim, start, min(self.stop, video.shape[dim]) - start)
        return torch.cat([x.narrow(dim, 0, self.lead), video], dim=dim) if self.lead else video

    def weights(self) -> Float[Tensor, "t"]:
        """How much each of its frames counts against those of other windows: 1, and linear ramps where it fades."""
        place = torch.arange(self.stop - self.start, dtype=torch.float32) + 0.5
        ramps = torch.minimum(place / max(self.rise, 0.5), place.flip(0) / max(self.fall, 0.5)).clamp(max=1)
        return torch.cat([torch.ones(self.lead), ramps])


@dataclass(frozen=True)
class SlidingWindow:
    """How a video is cut into windows.

    Args:
        size, stride: latent frames of a window, and from one to the next; what is left is their overlap.
        lead: frames in front of the video.
    """

    size: int
    stride: int
    lead: int = 0

    def windows(self, frames: int) -> list[Window]:
        """Of `frames` latent frames without those in front; the last window may be shorter. One alone does not fade."""
        overlap, windows = self.size - self.stride, []
        for start in range(0, frames, self.stride):
            is_last = start + self.size >= frames
            stop = min(start + self.size, frames)
            windows.append(Window(start, stop, overlap if start else 0, 0 if is_last else overlap, self.lead))
            if is_last:
                break
        return windows


def cut_conditions(conditions: Mapping[str, Any], window: Window) -> dict[str, Any]:
    """What `WanVideoPipeline.velocity` is given for a window: frame by frame where a condition has frames.

    Extensions are cut by their own `in_window`, behind one that puts the window where it stands in the video.
    """
    cut = dict(conditions)
    for name in ("condition_latents", "first_latents"):
        if cut.get(name) is not None:
            cut[name] = window.cut(cut[name])
    if cut.get("first_latents") is not None and not cut["first_latents"].shape[2]:
        cut["first_latents"] = None
    if cut.get("vace_condition") is not None:
        cut["vace_condition"] = replace(cut["vace_condition"], latents=window.cut(cut["vace_condition"].latents))
    moved = (each.in_window(window) for each in cut.get("extensions", ()))
    cut["extensions"] = (FramesAt(window.frames), *moved)
    return cut


def blend_windows(
    velocity: Callable[..., Float[Tensor, "b c t_window h w"]],
    windows: list[Window],
    latents: Float[Tensor, "b c t h w"],
    conditions: Mapping[str, Any],
) -> Float[Tensor, "b c t h w"]:
    """The weighted mean, frame by frame, of what `velocity(latents, **conditions)` gives for each window, one by one.

    Sums are fp32; beside them one window is in memory, however many there are. In the dtype of `latents`.
    """
    total = latents.new_zeros(latents.shape, dtype=torch.float32)
    weight = total.new_zeros(latents.shape[2], 1, 1)
    for window in windows:
        weights = window.weights().to(latents.device)[:, None, None]
        part = velocity(window.cut(latents), **cut_conditions(conditions, window)).float() * weights
        ahead, behind = slice(window.lead), slice(window.lead + window.start, window.lead + window.stop)
        for place, own in ((ahead, slice(window.lead)), (behind, slice(window.lead, None))):
            total[:, :, place] += part[:, :, own]
            weight[place] += weights[own]
    return (total / weight).to(latents.dtype)
