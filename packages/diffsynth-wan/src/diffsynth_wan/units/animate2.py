"""Wan-Animate-2: a character moves as a reference video does, clip by clip (`diffsynth_wan.variants.animate2`)."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import repeat
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from PIL import Image
from torch import Tensor

from diffsynth.core.parallel import SINGLE_PROCESS, MeshAxis, ProcessMesh
from diffsynth.runtime.unit import unit
from diffsynth_wan.extension import Extension, FramesAt
from diffsynth_wan.sharing import shared_out
from diffsynth_wan.units.canvas import Canvas
from diffsynth_wan.units.clips import Clip, clip_length, clip_pieces
from diffsynth_wan.units.prompt import encode_text
from diffsynth_wan.variants.animate2 import (
    REFERENCE_TIME,
    SKIPPED_BLOCKS,
    FollowReference,
    ReadReference,
    ReferenceVideo,
)
from diffsynth_wan.windows import SlidingWindow, Window

VIDEO = "animate2_reference_video"


@unit("reference_prompt_embeds", only_with=VIDEO)
def encode_reference_prompt(
    text_encoder: Any,
    tokenizer: Any,
    *,
    animate2_prompt_ref: str = " ",
    animate2_reference_video: Clip | None = None,
    device: torch.device,
) -> Float[Tensor, "1 s e"]:
    """Hidden states of what the reference video shows."""
    return encode_text(text_encoder, tokenizer, animate2_prompt_ref, device)


@unit("reference_image_embeds", only_with=VIDEO)
def see_reference(
    image_encoder: Any = None, *, animate2_reference_video: Clip | None = None, canvas: Canvas, image_dim: int
) -> Float[Tensor, "1 s e"] | None:
    """What the image encoder sees of the reference video's first frame."""
    if not image_dim:
        return None
    assert animate2_reference_video is not None, "only with it"
    clip = animate2_reference_video
    first = clip[:, :, 0].float().cpu() if isinstance(clip, Tensor) else canvas.pixels(clip[0])
    return image_encoder(first.to(canvas.device, canvas.dtype))


@unit("reference_latents", only_with=VIDEO)
def encode_reference(
    vae: Any, *, animate2_reference_video: Clip | None = None, canvas: Canvas
) -> Float[Tensor, "1 c t h w"]:
    """Latents of the reference video."""
    assert animate2_reference_video is not None, "only with it"
    return canvas.encode_clip(vae, VIDEO, animate2_reference_video)


@unit("animate_latents", only_with=VIDEO)
def encode_cast(
    vae: Any,
    *,
    animate_latents: Float[Tensor, "1 c_image t h w"] | None = None,
    animate2_reference_video: Clip | None = None,
    animate2_reference_image: Image.Image | None = None,
    animate2_refert_images: Clip | None = None,
    canvas: Canvas,
) -> Float[Tensor, "1 c_image t_lead h w"]:
    """Mask and latents of the character's image, in front of those of a grey clip that begins with the end of the clip
    before this one.
    """
    assert animate2_reference_image is not None, "checked before anything was encoded"
    image = canvas.encode_pieces(vae, [canvas.pixels(animate2_reference_image)[:, :, None]], num_frames=1)
    given = 0 if animate2_refert_images is None else clip_length(animate2_refert_images)
    clip = canvas.encode_pieces(vae, _continued(animate2_refert_images, given, canvas), num_frames=canvas.num_frames)
    mask = torch.zeros(canvas.num_frames, device=clip.device, dtype=clip.dtype)
    mask[:given] = 1
    # The first frame stands for all of its latent frame.
    mask = torch.cat([mask[:1].expand(canvas.time_factor - 1), mask]).unflatten(0, (-1, canvas.time_factor))
    mask = mask.T[None, :, :, None, None].expand(-1, -1, -1, *clip.shape[3:])
    image = torch.cat([image.new_ones(1, canvas.time_factor, *image.shape[2:]), image], dim=1)
    return torch.cat([image, torch.cat([mask, clip], dim=1)], dim=2)


def _continued(clip: Clip | None, given: int, canvas: Canvas) -> Iterator[Float[Tensor, "1 3 t height width"]]:
    """A clip as long as the video in pieces, grey behind the frames that are given."""
    pieces: Iterator[Tensor] = iter(())
    if clip is not None:
        size = {"num_frames": given, "height": canvas.height, "width": canvas.width}
        pieces = clip_pieces("animate2_refert_images", clip, piece=canvas.time_factor, **size)
    for frames in (1, *repeat(canvas.time_factor, canvas.latent_size[0] - 1)):
        piece = next(pieces, torch.zeros(1, 3, 0, canvas.height, canvas.width))
        yield F.pad(piece, (0, 0, 0, 0, 0, frames - piece.shape[2]))


@unit("lead_frames", only_with=VIDEO)
def lead_with_cast(*, lead_frames: int, animate2_reference_video: Clip | None = None) -> int:
    """The character's image is a latent frame in front of the video."""
    return lead_frames + 1


@unit("reference_windows", only_with=VIDEO)
def read_reference(
    dit: Any,
    *,
    animate2_reference_video: Clip | None = None,
    animate2_offload_kv: bool = False,
    reference_latents: Float[Tensor, "1 c t h w"],
    reference_prompt_embeds: Float[Tensor, "1 s e"],
    reference_image_embeds: Float[Tensor, "1 i e_image"] | None = None,
    sliding_window: SlidingWindow | None = None,
    canvas: Canvas,
    mesh: ProcessMesh | None = None,
) -> dict[int, ReferenceVideo]:
    """What the network keeps of the reference video, all steps and both branches alike: by the first frame of each
    window of a long video, which reads its own frames and no others.
    """
    frames = canvas.latent_size[0]
    windows = [Window(0, frames)] if sliding_window is None else sliding_window.windows(frames)
    axis = SINGLE_PROCESS if mesh is None else mesh.tokens
    read = {}
    for window in windows:
        read[window.start] = ReferenceVideo(offload=animate2_offload_kv)
        latents = reference_latents[:, :, window.start : window.stop]
        _read(dit, latents, window, read[window.start], reference_prompt_embeds, reference_image_embeds, axis)
    return read


def _read(
    dit: Any,
    latents: Float[Tensor, "1 c t h w"],
    window: Window,
    video: ReferenceVideo,
    prompt_embeds: Float[Tensor, "1 s e"],
    image_embeds: Float[Tensor, "1 i e_image"] | None,
    axis: MeshAxis,
) -> None:
    """One pass over clean latents, all of whose frames are given."""
    masked = dit.config.in_channels - 2 * latents.shape[1]
    mask = latents.new_ones(1, masked, *latents.shape[2:])
    dit(
        latents,
        torch.full((1,), REFERENCE_TIME, device=latents.device),
        prompt_embeds,
        image_embeds,
        torch.cat([mask, latents], dim=1),
        extensions=shared_out((FramesAt(tuple(range(window.start, window.stop))), ReadReference(video)), axis),
    )


@unit("extensions", only_with=VIDEO, branches={"uncond": {"steers_towards": "steers_away"}})
def follow_reference(
    *,
    extensions: tuple[Extension, ...],
    animate2_reference_video: Clip | None = None,
    animate2_log_scale: float = 0.0,
    reference_windows: dict[int, ReferenceVideo],
    steers_towards: bool,
) -> tuple[Extension, ...]:
    """The video follows what was read; what guidance steers away from is drawn without one of the blocks."""
    skip = frozenset() if steers_towards else SKIPPED_BLOCKS
    return (*extensions, FollowReference(reference_windows[0], animate2_log_scale, skip, reference_windows))
