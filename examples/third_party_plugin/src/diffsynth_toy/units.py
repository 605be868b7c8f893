"""Units of the pipeline: positional parameters are roles, keyword-only ones are read, the decorator names results."""

from collections.abc import Sequence

import torch

from diffsynth import unit
from diffsynth.runtime.image_units import image_size
from diffsynth.runtime.images import tensor_to_images
from diffsynth.sampling.noise import initial_noise
from diffsynth.sampling.schedule import z_image_sigmas
from diffsynth_toy.config import PATCH

round_size = image_size(PATCH, default=32)


@unit("sigmas")
def schedule(*, num_inference_steps: int):
    """Return noise levels, evenly spaced from 1 to 0."""
    return z_image_sigmas(num_inference_steps, shift=1.0)


@unit("letters", branches={"uncond": {"prompt": "negative_prompt"}})
def encode_prompt(*, prompt: str | Sequence[str] = "", device: torch.device):
    """Return the prompts as numbers, one per letter, padded with 0 to the longest."""
    words = [[ord(letter) - ord("a") + 1 for letter in text.lower() if "a" <= letter <= "z"] for text in prompt]
    longest = max(1, *map(len, words))
    return torch.tensor([word + [0] * (longest - len(word)) for word in words], device=device)


@unit("latents", random=True)
def initial_latents(*, height: int, width: int, seeds: list[int | None], device: torch.device, dtype: torch.dtype):
    """Return noise of the image's size: this network has no autoencoder."""
    return initial_noise((3, height, width), seeds, dtype=dtype, device=device)


@unit("output")
def to_images(*, latents: torch.Tensor, output_type: str):
    """Return images, or the pixels in [-1, 1]."""
    return latents if output_type == "tensor" else tensor_to_images(latents)
