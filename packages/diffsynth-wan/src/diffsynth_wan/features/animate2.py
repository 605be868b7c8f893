"""Wan-Animate-2: a character moves as in a reference video, clip by clip (`diffsynth_wan.variants.animate2`)."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from itertools import repeat
from typing import Any, TypedDict

import torch
import torch.nn.functional as F
from jaxtyping import Float
from PIL import Image
from torch import Tensor

from diffsynth.core.parallel import LONE_PROCESS, ProcessMesh
from diffsynth.runtime.feature import Condition, Configs, Feature, in_window
from diffsynth.runtime.unit import Phase, equals_default, unit
from diffsynth.sampling.windows import SlidingWindow, Window
from diffsynth_wan.extension import FramePositions
from diffsynth_wan.sharding import with_sharded_tokens
from diffsynth_wan.units.clips import Clip, check_call_clip, check_clip, clip_length
from diffsynth_wan.units.prompt import encode_text
from diffsynth_wan.units.shape import VideoShape
from diffsynth_wan.units.size import video_size
from diffsynth_wan.variants.animate2 import (
    REFERENCE_TIME,
    SKIPPED_BLOCKS,
    RecordReference,
    ReferenceAttention,
    ReferenceKVCache,
)

VIDEO = "animate2_reference_video"


class Animate2Arguments(TypedDict, total=False):
    """Inputs of Animate-2.

    Args:
        animate2_reference_image: Image of the character.
        animate2_reference_video: Video whose motion the character follows, with at least `num_frames` frames.
        animate2_prompt_ref: Prompt that describes the reference video.
        animate2_refert_images: Last frames of the previous clip to continue from, fewer than `num_frames`; None for the
            first clip.
        animate2_offload_kv: Whether keys and values of the reference video are stored on the CPU and copied to the
            device block by block; the result is the same.
        animate2_log_scale: Number that is added to the scores of attention to the first latent frame; 0, or -1.3 for
            the distilled model.
    """

    animate2_reference_image: Image.Image | None
    animate2_reference_video: Clip | None
    animate2_prompt_ref: str
    animate2_refert_images: Clip | None
    animate2_offload_kv: bool
    animate2_log_scale: float


@unit("reference_prompt_embeds", only_with=VIDEO, phase=Phase.TEXT)
def encode_reference_prompt(
    text_encoder: Any,
    tokenizer: Any,
    *,
    animate2_prompt_ref: str = " ",
    animate2_reference_video: Clip | None = None,
    prompt_weighting: bool = False,
    device: torch.device,
) -> Float[Tensor, "1 s e"]:
    """Return the text encoder's hidden states `1 s e` of the prompt that describes the reference video, cut (with a
    warning) or padded with zeros to 512 tokens.
    """
    options = {"prompt_weighting": prompt_weighting, "device": device}
    return encode_text(text_encoder, tokenizer, animate2_prompt_ref, **options)


@unit("reference_image_embeds", only_with=VIDEO, phase=Phase.ENCODE)
def encode_reference_image_embeds(
    image_encoder: Any = None, *, animate2_reference_video: Clip | None = None, video_shape: VideoShape, image_dim: int
) -> Float[Tensor, "1 s e"] | None:
    """Return CLIP's hidden states `1 s e` of the reference video's first frame; None if the network takes no image
    embeddings.
    """
    if not image_dim:
        return None
    assert animate2_reference_video is not None, "only with it"
    clip = animate2_reference_video
    first = clip[:, :, 0].float().cpu() if isinstance(clip, Tensor) else video_shape.pixels(clip[0])
    return image_encoder(first.to(video_shape.device, video_shape.dtype))


@unit("reference_latents", only_with=VIDEO, phase=Phase.ENCODE)
def encode_reference_video(
    vae: Any, *, animate2_reference_video: Clip | None = None, video_shape: VideoShape
) -> Float[Tensor, "1 c t h w"]:
    """Return the latents `1 c t h w` of the first frames of the reference video, as many as the call's video has."""
    assert animate2_reference_video is not None, "only with it"
    return video_shape.encode_clip(vae, VIDEO, animate2_reference_video)


@unit("animate_latents", only_with=VIDEO, phase=Phase.ENCODE)
def encode_animate2_latents(
    vae: Any,
    *,
    animate_latents: Float[Tensor, "1 c_image t h w"] | None = None,
    animate2_reference_video: Clip | None = None,
    animate2_reference_image: Image.Image | None = None,
    animate2_refert_images: Clip | None = None,
    video_shape: VideoShape,
) -> Float[Tensor, "1 c_image t_prefix h w"]:
    """Return a tensor `1 c_image t_prefix h w`, channels of a mask and of latents: one frame of the character's image,
    then those of a clip that is grey after the given frames.

    The clip begins with the last frames of the previous clip, if they are given.
    """
    assert animate2_reference_image is not None, "checked before anything was encoded"
    image = video_shape.encode_image(vae, animate2_reference_image)
    given = 0 if animate2_refert_images is None else clip_length(animate2_refert_images)
    frames, time_factor = video_shape.num_frames, video_shape.time_factor
    pieces = _padded_pieces(animate2_refert_images, given, video_shape)
    clip = video_shape.encode_pieces(vae, pieces, num_frames=frames)
    mask = torch.zeros(frames, device=clip.device, dtype=clip.dtype)
    mask[:given] = 1
    # The frames of a latent frame are channels of the mask; the first frame is repeated to fill its latent frame.
    mask = torch.cat([mask[:1].expand(time_factor - 1), mask]).unflatten(0, (-1, time_factor))
    mask = mask.T[None, :, :, None, None].expand(-1, -1, -1, *clip.shape[3:])
    image = torch.cat([image.new_ones(1, time_factor, *image.shape[2:]), image], dim=1)
    return torch.cat([image, torch.cat([mask, clip], dim=1)], dim=2)


def _padded_pieces(clip: Clip | None, given: int, shape: VideoShape) -> Iterator[Float[Tensor, "1 3 t height width"]]:
    """Yield a clip as long as the video in pieces (tensors of a few frames): the first `given` frames of `clip`, then
    grey (0) frames.
    """
    pieces: Iterator[Tensor] = iter(())
    if clip is not None:
        pieces = shape.clip_pieces("animate2_refert_images", clip, num_frames=given)
    for frames in (1, *repeat(shape.time_factor, shape.latent_size[0] - 1)):
        piece = next(pieces, torch.zeros(1, 3, 0, shape.height, shape.width))
        yield F.pad(piece, (0, 0, 0, 0, 0, frames - piece.shape[2]))


@unit("prefix_frames", only_with=VIDEO)
def add_animate2_prefix_frame(*, prefix_frames: int, animate2_reference_video: Clip | None = None) -> int:
    """Return the number of prefix frames: one more than `prefix_frames`, for the character's image."""
    return prefix_frames + 1


@unit("reference_caches", only_with=VIDEO, phase=Phase.NETWORK)
def cache_reference_video(
    dit: Any,
    *,
    animate2_reference_video: Clip | None = None,
    animate2_offload_kv: bool = False,
    reference_latents: Float[Tensor, "1 c t h w"],
    reference_prompt_embeds: Float[Tensor, "1 s e"],
    reference_image_embeds: Float[Tensor, "1 i e_image"] | None = None,
    sliding_window: SlidingWindow | None = None,
    video_shape: VideoShape,
    mesh: ProcessMesh | None = None,
) -> dict[int, ReferenceKVCache]:
    """Return a dict index of a window's first latent frame -> `ReferenceKVCache` with the keys and values of the
    reference video in that window; key 0 alone without sliding windows.

    One forward pass for each window fills its cache, for all steps and both branches of guidance.
    """
    frames = video_shape.latent_size[0]
    windows = [Window(0, frames)] if sliding_window is None else sliding_window.windows(frames)
    axis = LONE_PROCESS if mesh is None else mesh.tokens
    masked = dit.config.in_channels - 2 * reference_latents.shape[1]
    caches = {}
    for window in windows:
        cache = caches[window.start] = ReferenceKVCache(offload=animate2_offload_kv)
        latents = reference_latents[:, :, window.start : window.stop]
        mask = latents.new_ones(1, masked, *latents.shape[2:])
        positions = FramePositions(tuple(range(window.start, window.stop)))
        dit(
            latents,
            torch.full((1,), REFERENCE_TIME, device=latents.device),
            reference_prompt_embeds,
            reference_image_embeds,
            torch.cat([mask, latents], dim=1),
            extensions=with_sharded_tokens((positions, RecordReference(cache)), axis),
        )
    return caches


@unit(
    "reference_attention",
    only_with=VIDEO,
    branches={"uncond": {"is_cond": "is_cond_of_uncond"}},
    phase=Phase.NETWORK,
)
def attend_to_reference(
    *,
    animate2_reference_video: Clip | None = None,
    animate2_log_scale: float = 0.0,
    reference_caches: dict[int, ReferenceKVCache],
    is_cond: bool,
) -> ReferenceAttention:
    """Return a `ReferenceAttention` to the reference video, which in the unconditional branch skips the blocks in
    `SKIPPED_BLOCKS`.
    """
    skip = frozenset() if is_cond else SKIPPED_BLOCKS
    return ReferenceAttention(reference_caches[0], animate2_log_scale, skip, reference_caches)


DEFAULTS = {
    "animate2_reference_image": None,
    "animate2_reference_video": None,
    "animate2_refert_images": None,
    "animate2_prompt_ref": " ",
    "animate2_offload_kv": False,
    "animate2_log_scale": 0.0,
}
"""The arguments of Animate-2 -> their defaults; another network refuses other values."""


def check(configs: Configs, values: Mapping[str, Any]) -> None:
    """Raise an error for inputs of Animate-2 that the network does not take, that are missing, or that do not fit.

    Raises:
        ValueError: an input is given to another network, or missing; a clip is too short or too long.
    """
    check_call_clip(VIDEO, configs, values)
    _check_previous_clip(configs, values)
    config = configs["dit"]
    if config is None:
        return
    if not config.reference_video:
        for name, default in DEFAULTS.items():
            if not equals_default(values[name], default):
                raise ValueError(f"{name} is given, but this network takes no reference video; load an Animate-2 model")
        return
    missing = [name for name in ("animate2_reference_image", VIDEO) if values[name] is None]
    if missing:
        raise ValueError(f"this model needs a character's image and a reference video; pass {' and '.join(missing)}")


def _check_previous_clip(configs: Configs, values: Mapping[str, Any]) -> None:
    name, size = "animate2_refert_images", video_size(configs, values)
    clip, frames = values[name], size["num_frames"]
    if clip is None:
        return
    check_clip(name, clip, **{**size, "num_frames": 1})
    if (length := clip_length(clip)) >= frames:
        raise ValueError(f"{name} has {length} frames; expected fewer than num_frames={frames}, the last few of a clip")
    check_clip(name, clip, **{**size, "num_frames": length})


ANIMATE2 = Feature(
    "animate2",
    arguments=Animate2Arguments,
    units=(
        encode_reference_prompt,
        encode_reference_image_embeds,
        encode_reference_video,
        encode_animate2_latents,
        add_animate2_prefix_frame,
        cache_reference_video,
        attend_to_reference,
    ),
    conditions={"reference_attention": Condition(in_window, batch="separate")},
    check=check,
)
