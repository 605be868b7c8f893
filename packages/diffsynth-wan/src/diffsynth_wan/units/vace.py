"""VACE: a control video, a mask of what may change in it, and images that the video looks like (arXiv:2503.07598)."""

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
from diffsynth_wan.units.canvas import Canvas
from diffsynth_wan.units.clips import Clip, clip_pieces


@dataclass(frozen=True, eq=False)
class VaceCondition:
    """What VACE's network is given, and how much its hints count."""

    latents: Float[Tensor, "1 c t h w"]
    scale: float


@unit("vace_references", "lead_frames", requires=("vace",))
def encode_references(
    vae: Any,
    *,
    lead_frames: int,
    vace_reference_image: Image.Image | Sequence[Image.Image] | None = None,
    canvas: Canvas,
) -> tuple[Float[Tensor, "1 c t h w"] | None, int]:
    """Each reference image as a latent frame in front of the video; None without one."""
    if vace_reference_image is None:
        return None, lead_frames
    images = [vace_reference_image] if isinstance(vace_reference_image, Image.Image) else list(vace_reference_image)
    frames = [canvas.encode_pieces(vae, [canvas.pixels(image)[:, :, None]], num_frames=1) for image in images]
    return torch.cat(frames, dim=2), lead_frames + len(images)


@unit("vace_condition", requires=("vace",))
def encode_vace(
    vae: Any,
    *,
    vace_video: Clip | None = None,
    vace_video_mask: Clip | None = None,
    vace_references: Float[Tensor, "1 c t_lead h w"] | None = None,
    vace_scale: float = 1.0,
    canvas: Canvas,
) -> VaceCondition | None:
    """What the mask keeps of the video, what it leaves open, and the mask itself; the references in front.

    A missing video is grey, and without a mask everything may change.
    """
    if vace_video is None and vace_video_mask is None and vace_references is None:
        return None
    halves = (_masked(vace_video, vace_video_mask, canvas, kept=kept) for kept in (True, False))
    video = torch.cat([canvas.encode_pieces(vae, half, num_frames=canvas.num_frames) for half in halves], dim=1)
    mask = _folded_mask(vace_video_mask, canvas)
    if vace_references is not None:
        blank = torch.zeros_like(vace_references)
        video = torch.cat([torch.cat([vace_references, blank], dim=1), video], dim=2)
        mask = F.pad(mask, (0, 0, 0, 0, vace_references.shape[2], 0))
    return VaceCondition(torch.cat([video, mask], dim=1), vace_scale)


def _masked(clip: Clip | None, mask: Clip | None, canvas: Canvas, *, kept: bool) -> Iterator[Tensor]:
    """What the mask keeps of the video, grey elsewhere; or the rest of it."""
    pieces = zip(_pieces("vace_video", clip, canvas, missing=0.0), _mask_pieces(mask, canvas), strict=True)
    for pixels, changes in pieces:
        yield pixels * (1 - changes if kept else changes)


def _pieces(name: str, clip: Clip | None, canvas: Canvas, *, missing: float) -> Iterator[Tensor]:
    """The pixels of a clip, or a clip of one value, as long as the video is; one frame, then four at a time."""
    size = {"num_frames": canvas.num_frames, "height": canvas.height, "width": canvas.width}
    if clip is not None:
        yield from clip_pieces(name, clip, piece=canvas.time_factor, **size)
        return
    for frames in (1, *repeat(canvas.time_factor, canvas.latent_size[0] - 1)):
        yield torch.full((1, 3, frames, canvas.height, canvas.width), missing)


def _mask_pieces(clip: Clip | None, canvas: Canvas) -> Iterator[Float[Tensor, "1 3 t height width"]]:
    """1 where the video may change, else 0: a lossy file has all levels between, VACE was trained on two."""
    for pixels in _pieces("vace_video_mask", clip, canvas, missing=1.0):
        yield (pixels > 0).float()


def _folded_mask(clip: Clip | None, canvas: Canvas) -> Float[Tensor, "1 c t h w"]:
    """The mask at the resolution of pixels, those of a latent pixel as channels; of four frames one is taken."""
    factor, frames = canvas.vae_factor, canvas.latent_size[0]
    masks = torch.cat([piece[:, :1] for piece in _mask_pieces(clip, canvas)], dim=2)
    folded = rearrange(masks, "1 1 t (h p) (w q) -> 1 (p q) t h w", p=factor, q=factor)
    folded = F.interpolate(folded, size=(frames, *folded.shape[3:]), mode="nearest-exact")
    return folded.to(canvas.device, canvas.dtype)
