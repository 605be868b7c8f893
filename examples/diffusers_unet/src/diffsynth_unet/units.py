"""Units of the pipeline: size, noise levels, noise, and the images of the result."""

import torch

from diffsynth import Phase, unit
from diffsynth.runtime.image_units import image_size
from diffsynth.runtime.images import tensor_to_images
from diffsynth.sampling.noise import initial_noise
from diffsynth.sampling.prediction import from_variance_preserving
from diffsynth.sampling.schedule import BetaSchedule

BETAS = BetaSchedule.scaled_linear()
"""The betas that the network is trained with: `beta_schedule="scaled_linear"` in diffusers."""

round_size = image_size(8, default=32)


@unit("sigmas", phase=Phase.SHAPE)
def schedule(*, num_inference_steps: int):
    """Return the noise levels of training timesteps, the last one first."""
    return BETAS.sigmas(num_inference_steps)


@unit("latents", random=True, phase=Phase.LATENTS)
def initial_latents(
    *, sigmas: torch.Tensor, channels: int, height: int, width: int, seeds: list[int | None], device: torch.device
):
    """Return pixels of pure noise: it has variance 1 for this network, and another one in the loop's scaling."""
    noise = initial_noise((channels, height, width), seeds, dtype=torch.float32, device=device)
    return from_variance_preserving(noise, sigmas[:1].expand(len(noise)).to(device))


@unit("output")
def to_images(*, latents: torch.Tensor, output_type: str):
    """Return images, or the pixels in [-1, 1]."""
    return latents if output_type == "tensor" else tensor_to_images(latents)
