"""VACE: a control video, a mask of what may change in it, and reference images (arXiv:2503.07598)."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import repeat
from typing import Any

import torch
import torch.nn.functional as F
from einops import rearrange
from jaxtyping import Float
from PIL import Image
from torch import Tensor

from diffsynth.runtime.unit import unit
from diffsynth_wan.units.clips import Clip, clip_pieces
from diffsynth_wan.units.shape import VideoShape


@dataclass(frozen=True, eq=False)
class VaceCondition:
    """Control latents of the VACE network, and the factor of its hints."""

    latents: Float[Tensor, "1 c t h w"]
    scale: float


@unit("vace_references", "prefix_frames", requires=("vace",))
def encode_vace_references(
    vae: Any,
    *,
    prefix_frames: int,
    vace_reference_image: Image.Image | Sequence[Image.Image] | None = None,
    video_shape: VideoShape,
) -> tuple[Float[Tensor, "1 c t h w"] | None, int]:
    """Return (latents, number of prefix frames): latents `1 c t h w` of the reference images, a frame each, and
    `prefix_frames` plus their number; `(None, prefix_frames)` without images.
    """
    if vace_reference_image is None:
        return None, prefix_frames
    images = [vace_reference_image] if isinstance(vace_reference_image, Image.Image) else list(vace_reference_image)
    frames = [video_shape.encode_image(vae, image) for image in images]
    return torch.cat(frames, dim=2), prefix_frames + len(images)


@unit("vace_condition", requires=("vace",))
def encode_vace_condition(
    vae: Any,
    *,
    vace_video: Clip | None = None,
    vace_video_mask: Clip | None = None,
    vace_references: Float[Tensor, "1 c t_prefix h w"] | None = None,
    vace_scale: float = 1.0,
    video_shape: VideoShape,
) -> VaceCondition | None:
    """Return a `VaceCondition`: latents of a video's kept and of its changeable pixels, and the mask, along the
    channels, with a scale; None without VACE inputs.

    The reference images are the first frames.

    A missing video is grey, and without a mask all of it may change.
    """
    if vace_video is None and vace_video_mask is None and vace_references is None:
        return None
    halves = (_masked(vace_video, vace_video_mask, video_shape, kept=kept) for kept in (True, False))
    frames = video_shape.num_frames
    video = torch.cat([video_shape.encode_pieces(vae, half, num_frames=frames) for half in halves], dim=1)
    mask = _folded_mask(vace_video_mask, video_shape)
    if vace_references is not None:
        blank = torch.zeros_like(vace_references)
        video = torch.cat([torch.cat([vace_references, blank], dim=1), video], dim=2)
        mask = F.pad(mask, (0, 0, 0, 0, vace_references.shape[2], 0))
    return VaceCondition(torch.cat([video, mask], dim=1), vace_scale)


def _masked(clip: Clip | None, mask: Clip | None, shape: VideoShape, *, kept: bool) -> Iterator[Tensor]:
    """Yield a video in pieces (tensors of a few frames) with only the kept, or only the changeable, pixels; the other
    pixels are grey (0).
    """
    pieces = zip(_pieces("vace_video", clip, shape, missing=0.0), _mask_pieces(mask, shape), strict=True)
    for pixels, changeable in pieces:
        yield pixels * (1 - changeable if kept else changeable)


def _pieces(name: str, clip: Clip | None, shape: VideoShape, *, missing: float) -> Iterator[Tensor]:
    """Yield the pixels of `clip` as tensors of a few frames; if it is None, tensors filled with `missing`."""
    size = {"num_frames": shape.num_frames, "height": shape.height, "width": shape.width}
    if clip is not None:
        yield from clip_pieces(name, clip, piece=shape.time_factor, **size)
        return
    for frames in (1, *repeat(shape.time_factor, shape.latent_size[0] - 1)):
        yield torch.full((1, 3, frames, shape.height, shape.width), missing)


def _mask_pieces(clip: Clip | None, shape: VideoShape) -> Iterator[Float[Tensor, "1 3 t height width"]]:
    """Yield a mask in pieces (tensors of a few frames): 1 for changeable pixels, 0 for kept ones; all 1 if `clip` is
    None.

    A lossy file has other levels, which VACE was not trained with.
    """
    for pixels in _pieces("vace_video_mask", clip, shape, missing=1.0):
        yield (pixels > 0).float()


def _folded_mask(clip: Clip | None, shape: VideoShape) -> Float[Tensor, "1 c t h w"]:
    """Return a mask `1 c t h w` whose channels are the pixels of a latent pixel: 1 for changeable pixels, 0 for kept
    ones; one video frame is used for each latent frame.
    """
    factor, frames = shape.vae_factor, shape.latent_size[0]
    masks = torch.cat([piece[:, :1] for piece in _mask_pieces(clip, shape)], dim=2)
    folded = rearrange(masks, "1 1 t (h p) (w q) -> 1 (p q) t h w", p=factor, q=factor)
    folded = F.interpolate(folded, size=(frames, *folded.shape[3:]), mode="nearest-exact")
    return folded.to(shape.device, shape.dtype)
