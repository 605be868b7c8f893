"""Units of the Qwen-Image pipeline, in the order they run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from diffsynth.runtime.image_units import encode_input_image, image_latents, image_size, round_up, set_tiling
from diffsynth.runtime.prompts import distinct_prompts
from diffsynth.runtime.unit import Phase, unit
from diffsynth.sampling.schedule import LIGHTNING_MU, qwen_image_lightning_sigmas, qwen_image_sigmas
from diffsynth_qwen_image.config import TOKEN_FACTOR, VAE_FACTOR
from diffsynth_qwen_image.prompts import PromptImages, tokenize

round_size = image_size(multiple=TOKEN_FACTOR, default=1328)


def check_schedule(values: Mapping[str, Any]) -> None:
    """Raise ValueError for noise levels that are no schedule, or beside arguments that would make others."""
    sigmas = values["sigmas"]
    if sigmas is None:
        return
    levels = [float(level) for level in sigmas]
    falling = all(before > after for before, after in pairwise([*levels, 0.0]))
    if not levels or not falling or levels[0] > 1:
        raise ValueError(
            f"sigmas={levels}: expected at least one noise level in (0, 1], each lower than the one before; the last "
            "step goes to 0, which is not listed"
        )
    for name, default in (("exponential_shift_mu", None), ("lightning_schedule", False), ("denoising_strength", 1.0)):
        if values[name] != default:
            raise ValueError(f"sigmas and {name}={values[name]} are given; leave out one: each sets the noise levels")


@unit("sigmas", phase=Phase.SHAPE, check=check_schedule)
def schedule(
    *,
    num_inference_steps: int,
    denoising_strength: float = 1.0,
    exponential_shift_mu: float | None = None,
    lightning_schedule: bool = False,
    sigmas: Sequence[float] | None = None,
    height: int,
    width: int,
) -> Float[Tensor, "steps_plus_1"]:
    """Return a tensor `steps_plus_1` of the noise levels (sigmas in [0, 1]) of the steps, falling, and a last 0; the
    more tokens the image has, the higher they are.
    """
    if sigmas is not None:
        return torch.tensor([*map(float, sigmas), 0.0])
    strength = denoising_strength
    if lightning_schedule:
        mu = LIGHTNING_MU if exponential_shift_mu is None else exponential_shift_mu
        return qwen_image_lightning_sigmas(num_inference_steps, mu=mu, strength=strength)
    num_tokens = (round_up(height, TOKEN_FACTOR) // TOKEN_FACTOR) * (round_up(width, TOKEN_FACTOR) // TOKEN_FACTOR)
    return qwen_image_sigmas(num_inference_steps, num_tokens=num_tokens, mu=exponential_shift_mu, strength=strength)


@unit("prompt_embeds", "prompt_mask", branches={"uncond": {"prompt": "negative_prompt"}}, phase=Phase.TEXT)
def encode_prompt(
    text_encoder: Any,
    tokenizer: Any,
    *,
    prompt: str | Sequence[str] = "",
    prompt_images: PromptImages | None = None,
    device: torch.device,
    dtype: torch.dtype,
) -> tuple[Float[Tensor, "b s e"], Bool[Tensor, "b s"] | None]:
    """Return (hidden states `b s e` of the prompts, with images before them if there are any; bool mask `b s`, True for
    text, False for padding to the longest prompt, or None if nothing is padded).

    Prompts over `MAX_PROMPT_TOKENS`, besides the images, are cut with a warning; equal ones are encoded once.
    """
    distinct, order = distinct_prompts(prompt, device=device)
    tokens = tokenize(tokenizer, distinct, prompt_images)
    images: dict[str, Any] = {}
    if prompt_images is not None:
        patches = prompt_images.patches.repeat(len(distinct), 1).to(device, dtype)
        images = {"patches": patches, "grids": prompt_images.grids * len(distinct), "image_mask": tokens.image_mask}
    embeds = text_encoder(tokens.input_ids.to(device), tokens.mask.to(device), **images)
    kept = tokens.mask[:, tokens.dropped :].bool()
    return embeds[:, tokens.dropped :][order], None if bool(kept.all()) else kept.to(device)[order]


initial_latents = image_latents(VAE_FACTOR)

UNITS = (round_size, set_tiling, schedule, encode_prompt, encode_input_image, initial_latents)
