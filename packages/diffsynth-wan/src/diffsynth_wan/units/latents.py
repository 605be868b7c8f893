"""Noise levels, initial latents, the switch between two experts, and decoding of the result."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from einops import rearrange
from jaxtyping import Float
from PIL import Image
from torch import Tensor

from diffsynth.core.progress import track
from diffsynth.runtime import image_units
from diffsynth.runtime.argument_types import RandDevice
from diffsynth.runtime.images import check_decoded, tensor_to_images
from diffsynth.runtime.unit import Phase, unit
from diffsynth.sampling.noise import add_noise, initial_noise
from diffsynth.sampling.schedule import wan_sigmas
from diffsynth_wan.units.shape import VideoShape


@unit("sigmas", phase=Phase.SHAPE)
def schedule(
    *, num_inference_steps: int, denoising_strength: float = 1.0, sigma_shift: float = 5.0
) -> Float[Tensor, "steps_plus_1"]:
    """Return a tensor `steps_plus_1` of the noise levels (sigmas in [0, 1]) of the steps, falling, and a last 0."""
    return wan_sigmas(num_inference_steps, shift=sigma_shift, strength=denoising_strength)


@unit("expert_boundary", requires=("dit2",), phase=Phase.SHAPE)
def set_boundary(*, switch_DiT_boundary: float = 0.875) -> float:  # noqa: N803 - the published name
    """Return `switch_DiT_boundary` as a float: the noise level in [0, 1] below which `dit2` replaces `dit` (Wan 2.2
    with two experts).

    Raises:
        ValueError: the level is not in [0, 1].
    """
    if isinstance(switch_DiT_boundary, bool) or not 0 <= switch_DiT_boundary <= 1:
        raise ValueError(f"switch_DiT_boundary={switch_DiT_boundary!r}: expected a noise level in [0, 1]")
    return float(switch_DiT_boundary)


@unit("noise", random=True, phase=Phase.LATENTS)
def generate_noise(
    *,
    video_shape: VideoShape,
    latent_channels: int,
    prefix_frames: int,
    seeds: list[int | None],
    rand_device: RandDevice = "cpu",
    vace_references: Float[Tensor, "1 c t_prefix h w"] | None = None,
) -> Float[Tensor, "b c t h w"]:
    """Return a tensor of noise `b c t h w`, a video for each of `seeds` with the prefix frames first, generated in fp32
    and cast to the dtype of `video_shape`.

    Frames are generated in their order, but those of `vace_references` last, as in DiffSynth-Studio: so the noise of
    the video does not depend on the number of references. diffusers generates them first.
    """
    frames, height, width = video_shape.latent_size
    shape = (latent_channels, frames + prefix_frames, height, width)
    noise = initial_noise(shape, seeds, rand_device=rand_device, dtype=torch.float32, device=video_shape.device)
    generated_last = 0 if vace_references is None else vace_references.shape[2]
    return noise.roll(generated_last, dims=2).to(video_shape.dtype)


def check_strength(values: Mapping[str, Any]) -> None:
    """Raise ValueError if a call begins at a noise level below 1 without a video to begin with."""
    image_units.check_strength(values, "input_video")


@unit("latents", phase=Phase.LATENTS, check=check_strength, ignores=image_units.ignored_input)
def initial_latents(
    *,
    noise: Float[Tensor, "b c t h w"],
    sigmas: Float[Tensor, "steps_plus_1"],
    input_latents: Float[Tensor, "1 c t_in h w"] | None = None,
    first_latents: Float[Tensor, "1 c t_first h w"] | None = None,
    vace_references: Float[Tensor, "1 c t_prefix h w"] | None = None,
) -> Float[Tensor, "b c t h w"]:
    """Return the latents `b c t h w` of the first step: noise, or `vace_references` and the input video noised to the
    first noise level; the first frames are replaced by `first_latents`, without noise, if given.
    """
    latents = noise
    if input_latents is not None:
        whole = input_latents if vace_references is None else torch.cat([vace_references, input_latents], dim=2)
        latents = add_noise(whole.expand_as(noise), noise, sigmas[0])
    if first_latents is None:
        return latents
    given = first_latents.shape[2]
    return torch.cat([first_latents.expand(len(latents), -1, -1, -1, -1), latents[:, :, given:]], dim=2)


@unit("output")
def decode_video(
    vae: Any, *, latents: Float[Tensor, "b c t h w"], prefix_frames: int, video_shape: VideoShape, output_type: str
) -> list[list[Image.Image]] | Float[Tensor, "b 3 frames height width"]:
    """Return a list with a list of PIL images for each video; or, for the output type `"tensor"`, a tensor `b 3 t h w`
    in [-1, 1]. Prefix frames are left out.
    """
    pieces = list(latents[:, :, prefix_frames:].split(1, dim=2))
    decoded = vae.decode_pieces(track(pieces, total=len(pieces), unit="pieces"), **video_shape.tiling)
    if output_type == "tensor":
        whole = torch.cat(list(decoded), dim=2)
        check_decoded(whole)  # clamping hides infinity
        return whole.clamp_(-1, 1)
    videos: list[list[Image.Image]] = [[] for _ in latents]
    for piece in decoded:
        # Piece by piece: the pixels of the whole video as floats would take two or four times the memory.
        for video, pixels in zip(videos, piece, strict=True):
            video += tensor_to_images(rearrange(pixels, "c t h w -> t c h w"))
    return videos
