"""Where the loop starts, and from its end to frames: noise levels, noise, a video to start from, decoding."""

from __future__ import annotations

from typing import Any

import torch
from einops import rearrange
from jaxtyping import Float
from PIL import Image
from torch import Tensor

from diffsynth.runtime.images import tensor_to_images
from diffsynth.runtime.progress import progress_bar
from diffsynth.runtime.unit import unit
from diffsynth.sampling.noise import add_noise, initial_noise
from diffsynth.sampling.schedule import wan_sigmas
from diffsynth_wan.units.canvas import Canvas
from diffsynth_wan.units.clips import Clip


@unit("sigmas")
def schedule(
    *, num_inference_steps: int, denoising_strength: float = 1.0, sigma_shift: float = 5.0
) -> Float[Tensor, "steps_plus_1"]:
    """Noise levels."""
    return wan_sigmas(num_inference_steps, shift=sigma_shift, strength=denoising_strength)


@unit("noise", random=True)
def draw_noise(
    *,
    canvas: Canvas,
    latent_channels: int,
    lead_frames: int,
    seeds: list[int | None],
    rand_device: str = "cpu",
) -> Float[Tensor, "b c t h w"]:
    """Drawn in fp32, then cast; that of frames in front of the video is drawn last, so that the video keeps its own."""
    frames, height, width = canvas.latent_size
    shape = (latent_channels, frames + lead_frames, height, width)
    noise = initial_noise(shape, seeds, rand_device=rand_device, dtype=torch.float32, device=canvas.device)
    return noise.roll(lead_frames, dims=2).to(canvas.dtype)


@unit("input_latents")
def encode_video(vae: Any, *, input_video: Clip | None = None, canvas: Canvas) -> Float[Tensor, "1 c t h w"] | None:
    """Latents of the video to start from; None without one."""
    return None if input_video is None else canvas.encode_clip(vae, "input_video", input_video)


@unit("latents")
def initial_latents(
    *,
    noise: Float[Tensor, "b c t h w"],
    sigmas: Float[Tensor, "steps_plus_1"],
    input_latents: Float[Tensor, "1 c t_in h w"] | None = None,
    first_latents: Float[Tensor, "1 c t_first h w"] | None = None,
    vace_references: Float[Tensor, "1 c t_lead h w"] | None = None,
) -> Float[Tensor, "b c t h w"]:
    """The noise, or the input noised to the first level of the schedule; first frames stand in it as they are given."""
    latents = noise
    if input_latents is not None:
        whole = input_latents if vace_references is None else torch.cat([vace_references, input_latents], dim=2)
        latents = add_noise(whole.expand_as(noise), noise, sigmas[0])
    if first_latents is None:
        return latents
    kept = first_latents.shape[2]
    return torch.cat([first_latents.expand(len(latents), -1, -1, -1, -1), latents[:, :, kept:]], dim=2)


@unit("output")
def decode_video(
    vae: Any, *, latents: Float[Tensor, "b c t h w"], lead_frames: int, canvas: Canvas, output_type: str
) -> list[list[Image.Image]] | Float[Tensor, "b 3 frames height width"]:
    """A list of frames for each video, or a tensor in [-1, 1]; latent frames in front of the video are dropped."""
    pieces = list(latents[:, :, lead_frames:].split(1, dim=2))
    decoded = vae.decode_pieces(progress_bar(pieces, description="decode", total=len(pieces)), **canvas.tiling)
    if output_type == "tensor":
        return torch.cat(list(decoded), dim=2).clamp_(-1, 1)
    videos: list[list[Image.Image]] = [[] for _ in latents]
    for piece in decoded:
        # At once: as floats the pixels of the whole video would take two or four times as much.
        for video, pixels in zip(videos, piece, strict=True):
            video += tensor_to_images(rearrange(pixels, "c t h w -> t c h w"))
    return videos
