"""Clips, the videos that a user passes to a call: checks of their length and size, and reading in pieces."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from itertools import islice
from typing import Any, TypeAlias

import torch
from jaxtyping import Float
from PIL import Image
from torch import Tensor

from diffsynth.core.data.color import to_mask
from diffsynth.core.data.image import ResizeMode
from diffsynth.runtime.feature import Configs
from diffsynth.runtime.images import image_to_tensor
from diffsynth.terminal import module_logger
from diffsynth_wan.units.size import video_size

logger = module_logger(__name__)

Clip: TypeAlias = Sequence[Image.Image] | Tensor
"""Frames in order, decoded or decoded on access, or a tensor `1 3 t h w` in [-1, 1]."""


def clip_length(clip: Clip) -> int:
    """Return the number of frames of `clip`, a sequence of images or a tensor `1 3 t h w`."""
    return clip.shape[2] if isinstance(clip, Tensor) else len(clip)


def check_clip(name: str, clip: Clip, *, num_frames: int, height: int, width: int, any_size: bool = False) -> None:
    """Raise an error if a clip (images or a tensor) is too short for a video of this size or cannot be fitted to it; no
    frame is decoded or encoded.

    Args:
        name: name of the call's argument, for messages.
        clip: value of the argument.
        num_frames, height, width: size of the video.
        any_size: accept a tensor of another height and width.

    Raises:
        ValueError: it is too short, its frames differ in size, or a tensor has another shape.
    """
    if isinstance(clip, Tensor):
        expected = f"(1, 3, {num_frames} or more, {height}, {width})"
        size = tuple(clip.shape[3:]) if any_size else (height, width)
        if clip.ndim != 5 or (*clip.shape[:2], *clip.shape[3:]) != (1, 3, *size):
            raise ValueError(f"{name} is a tensor of shape {tuple(clip.shape)}; expected {expected}")
    length = clip_length(clip)
    if length < num_frames:
        fitting = 4 * ((length - 1) // 4) + 1
        advice = f"a longer clip, or num_frames={fitting}" if length else "a clip with frames"
        raise ValueError(f"{name} has {length} frames, the video needs {num_frames}; pass {advice}")
    if isinstance(clip, list | tuple):
        for index, frame in enumerate(clip[:num_frames]):
            _check_size(name, index, frame, clip[0])


def check_call_clip(name: str, configs: Configs, values: Mapping[str, Any]) -> None:
    """Raise an error if the argument `name` of a call is a clip that does not fit the call's video; None passes.

    Args:
        name: of the argument.
        configs: role -> config, of which that of the autoencoder determines the rounding.
        values: arguments of the call.

    Raises:
        ValueError: see `check_clip`.
    """
    if values[name] is not None:
        check_clip(name, values[name], **video_size(configs, values))


def check_mask_clip(mask: str, video: str, values: Mapping[str, Any]) -> None:
    """Raise ValueError unless the clips of the arguments `mask` and `video` have as many frames."""
    masks, frames = clip_length(values[mask]), clip_length(values[video])
    if masks != frames:
        raise ValueError(f"{mask} has {masks} frames, {video} {frames}; expected one mask for each frame")


def clip_pieces(
    name: str,
    clip: Clip,
    *,
    num_frames: int,
    height: int,
    width: int,
    resize_mode: ResizeMode,
    piece: int,
    is_mask: bool = False,
) -> Iterator[Float[Tensor, "1 3 t height width"]]:
    """Yield the pixels of the first `num_frames` frames of `clip` as fp32 CPU tensors `1 3 t height width` in [-1, 1]:
    the first frame alone, then `piece` frames at a time, the last tensor perhaps fewer.

    Frames of another size are scaled to height x width as `resize_mode` says. A frame with transparency is over white,
    or, of a mask, its alpha channel.
    """
    if (length := clip_length(clip)) > num_frames:
        logger.info("%s has %d frames; the first %d are used", name, length, num_frames)
    if isinstance(clip, Tensor):
        yield clip[:, :, :1].float().cpu()
        for start in range(1, num_frames, piece):
            yield clip[:, :, start : min(start + piece, num_frames)].float().cpu()
        return
    frames = _same_size(name, islice(clip, num_frames))
    if is_mask:
        frames = (to_mask(frame) if frame.has_transparency_data else frame for frame in frames)
    to_tensor = partial(image_to_tensor, height=height, width=width, resize_mode=resize_mode)
    yield to_tensor(next(frames))[:, :, None]
    while part := list(islice(frames, piece)):
        yield torch.stack([to_tensor(frame) for frame in part], dim=2)


def _same_size(name: str, frames: Iterator[Image.Image]) -> Iterator[Image.Image]:
    """Yield the given frames, PIL images, unchanged; raise ValueError at the first whose size differs from the first
    frame's.

    `check_clip` cannot see the size before a frame is decoded.
    """
    first = None
    for index, frame in enumerate(frames):
        first = frame if first is None else first
        _check_size(name, index, frame, first)
        yield frame


def _check_size(name: str, index: int, frame: Image.Image, first: Image.Image) -> None:
    if frame.size != first.size:
        raise ValueError(
            f"frame {index} of {name} is {frame.width}x{frame.height}, the first one {first.width}x{first.height}; "
            f"expected one size"
        )
