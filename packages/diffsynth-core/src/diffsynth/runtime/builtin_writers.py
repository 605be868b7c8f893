"""The writers of core: images, videos, sound and safetensors files, each with the record of the call inside."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from diffsynth import provenance
from diffsynth.core.data.media_writer import images_of

_MODES = ("L", "LA", "RGB", "RGBA")
"""Modes of PIL whose pixels are bytes, one for each channel."""


def write_image(output: Image.Image, path: Path, *, record: Mapping[str, Any]) -> None:
    """Write a PIL image as PNG.

    Args:
        output: the image.
        path: the file.
        record: of the call, stored in a text chunk.

    Raises:
        TypeError: the output is no image.
    """
    if not isinstance(output, Image.Image):
        raise TypeError(_refusal(output, path, "image", "a PIL image"))
    provenance.save_png(output, path, record)


def write_jpeg(output: Image.Image, path: Path, *, record: Mapping[str, Any], quality: float = 95) -> None:
    """Write a PIL image as JPEG.

    Args:
        output: the image, without transparency.
        path: the file.
        record: of the call, stored in EXIF.
        quality: 1 to 100.

    Raises:
        TypeError: the output is no image.
        ValueError: an image with transparency, or a quality out of range.
    """
    if not isinstance(output, Image.Image):
        raise TypeError(_refusal(output, path, "image", "a PIL image"))
    provenance.save_jpeg(output, path, record, quality=quality)


def write_webp(
    output: Image.Image | Sequence[Image.Image] | Tensor,
    path: Path,
    *,
    record: Mapping[str, Any],
    fps: float | None = None,
    quality: float = 95,
) -> None:
    """Write a PIL image as WebP, or frames as an animation.

    Args:
        output: the image; or frames, as `write_video` takes them.
        path: the file.
        record: of the call, stored in EXIF.
        fps: frames per second of an animation, above 0.
        quality: 1 to 100; 100 is lossless.

    Raises:
        TypeError: the output is neither.
        ValueError: frames of several sizes or without `fps`, or a number out of range.
    """
    images = [output] if isinstance(output, Image.Image) else _frames_of(output, path, "image or video")
    provenance.save_webp(images, path, record, fps=fps, quality=quality)


def write_gif(output: Sequence[Image.Image] | Tensor, path: Path, *, record: Mapping[str, Any], fps: float) -> None:
    """Write frames as a GIF animation.

    Args:
        output: frames, as `write_video` takes them.
        path: the file.
        record: of the call, stored in the comment.
        fps: frames per second, above 0 and at most 50.

    Raises:
        TypeError: the output is no sequence of frames and no tensor.
        ValueError: no frames, frames of several sizes, or a frame rate out of range.
    """
    provenance.save_gif(_frames_of(output, path, "video"), path, record, fps=fps)


def write_frames(output: Sequence[Image.Image] | Tensor, path: Path, *, record: Mapping[str, Any]) -> None:
    """Write frames to a new folder as `00000.png`, `00001.png`, ...

    Args:
        output: frames, as `write_video` takes them.
        path: the folder, which does not exist or is empty.
        record: of the call, stored in each frame.

    Raises:
        TypeError: the output is no sequence of frames and no tensor.
    """
    provenance.save_frames(_frames_of(output, path, "video"), path, record)


def write_video(
    output: Sequence[Image.Image] | Tensor, path: Path, *, record: Mapping[str, Any], fps: float, quality: float = 90
) -> None:
    """Write frames as a video in H.264.

    Args:
        output: frames of one size, PIL images or uint8 arrays `h w 3`; or a tensor: `c t h w` or `1 c t h w` in
            [-1, 1], or uint8 `t h w 3`.
        path: the file.
        record: of the call, stored in the comment.
        fps: frames per second, above 0.
        quality: 1 to 100, which is crf 50 to 0 of H.264.

    Raises:
        TypeError: the output is no sequence of frames and no tensor.
        ValueError: no frames, frames of several sizes, a tensor of another shape, or a wrong frame rate.
    """
    _check_frames(output, path, "video")
    try:
        provenance.save_video(output, path, record, fps=fps, quality=quality / 10)  # type: ignore[arg-type]
    except ValueError as error:
        raise ValueError(f"{path} cannot be written as video: {error}") from error


def write_audio(output: Any, path: Path, *, record: Mapping[str, Any], sample_rate: int | None = None) -> None:
    """Write sound as WAV, 16-bit PCM.

    Args:
        output: an `Audio`, another object with `samples` and `sample_rate`, or a floating-point tensor
            `channels samples`; samples are in [-1, 1].
        path: the file.
        record: of the call, stored in the comment.
        sample_rate: samples per second of a tensor, in Hz; an object has its own.

    Raises:
        TypeError: the output is neither.
        ValueError: samples of another shape or dtype, or not finite; a tensor without a sample rate, or an object with
            another one than `sample_rate`.
    """
    samples = output if isinstance(output, Tensor) else getattr(output, "samples", None)
    if not isinstance(samples, Tensor):
        raise TypeError(_refusal(output, path, "audio", "an object with samples and sample_rate, or a tensor c n"))
    own = getattr(output, "sample_rate", None)
    rate = own if sample_rate is None else sample_rate
    if rate is None:
        raise ValueError(
            f"{path} cannot be written as audio: the output, {_described(output)}, states no sample rate. Return an "
            "Audio(samples, sample_rate), or give sample_rate"
        )
    if own is not None and sample_rate not in (None, own):
        raise ValueError(
            f"{path} cannot be written as audio: sample_rate={sample_rate!r}, and the output has {own!r}; leave it out"
        )
    try:
        provenance.save_audio(samples, rate, path, record)
    except ValueError as error:
        raise ValueError(f"{path} cannot be written as audio: {error}") from error


def write_tensors(output: Any, path: Path, *, record: Mapping[str, Any]) -> None:
    """Write tensors as safetensors: a tensor as "output", a mapping by its names, sound as "samples" and "sample_rate",
    an image as "image" `h w c` and frames as "images" `t h w c`, both uint8.

    Args:
        output: a tensor; a mapping from names to tensors; an object with `samples` and `sample_rate`; a PIL image, or a
            sequence of PIL images of one size and mode.
        path: the file.
        record: of the call, stored in the metadata.

    Raises:
        TypeError: the output is none of these.
        ValueError: an empty mapping or sequence, images of several sizes, or of a mode without bytes for channels.
    """
    provenance.save_tensors(_tensors_of(output, path), path, record)


def _check_frames(output: Any, path: Path, kind: str) -> None:
    has_frames = isinstance(output, Sequence) and len(output) > 0 and isinstance(output[0], Image.Image | np.ndarray)
    if not has_frames and not isinstance(output, Tensor):
        raise TypeError(_refusal(output, path, kind, "a list of frames, PIL images, or a tensor c t h w in [-1, 1]"))


def _frames_of(output: Any, path: Path, kind: str) -> list[Image.Image]:
    """Return a list of the PIL images of frames, of arrays or of a tensor."""
    _check_frames(output, path, kind)
    try:
        return list(images_of(output))
    except ValueError as error:
        raise ValueError(f"{path} cannot be written as {kind}: {error}") from error


def _tensors_of(output: Any, path: Path) -> dict[str, Tensor]:
    """Return a dict name -> tensor of what an output holds."""
    if isinstance(output, Tensor):
        return {"output": output}
    if isinstance(output, Mapping) and all(isinstance(value, Tensor) for value in output.values()):
        if not output:
            raise ValueError(f"{path} cannot be written as tensors: the output is an empty mapping")
        return {str(name): value for name, value in output.items()}
    samples, sample_rate = getattr(output, "samples", None), getattr(output, "sample_rate", None)
    if isinstance(samples, Tensor) and isinstance(sample_rate, int):
        return {"samples": samples, "sample_rate": torch.tensor(sample_rate)}
    if isinstance(output, Image.Image):
        return {"image": _bytes_of(output, path)}
    if isinstance(output, Sequence) and output and all(isinstance(one, Image.Image) for one in output):
        if len({(one.size, one.mode) for one in output}) > 1:
            raise ValueError(f"{path} cannot be written as tensors: the output has images of several sizes or modes")
        return {"images": torch.stack([_bytes_of(one, path) for one in output])}
    expected = "a tensor, a mapping from names to tensors, an Audio, a PIL image, or a list of PIL images"
    raise TypeError(_refusal(output, path, "tensors", expected))


def _bytes_of(image: Image.Image, path: Path) -> Tensor:
    """Return the pixels of an image as a uint8 tensor `h w c`."""
    if image.mode not in _MODES:
        raise ValueError(
            f"{path} cannot be written as tensors: an image of mode {image.mode!r}; expected one of {', '.join(_MODES)}"
        )
    return torch.from_numpy(np.atleast_3d(np.array(image)))


def _refusal(output: Any, path: Path, kind: str, expected: str) -> str:
    return f"{path} cannot be written as {kind}: the output is {_described(output)}; expected {expected}"


def _described(output: Any) -> str:
    """Return what an output is, as text: "a tensor of shape (1, 3, 8, 8)", "a list of 2 Image"."""
    if isinstance(output, Tensor):
        return f"a tensor of shape {tuple(output.shape)}"
    name = type(output).__name__
    article = "an" if name[:1] in "AEIOUaeiou" else "a"
    if isinstance(output, list | tuple):
        return f"{article} {name} of {len(output)}" + (f" {type(output[0]).__name__}" if output else "")
    return f"{article} {name}"
