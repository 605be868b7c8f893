"""Units of the Qwen-Image pipeline, in the order they run."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from diffsynth.runtime.image_units import encode_input_image, image_latents, image_size, round_up
from diffsynth.runtime.prompts import cut_prompt, distinct_prompts
from diffsynth.runtime.unit import Phase, unit
from diffsynth.sampling.schedule import LIGHTNING_MU, qwen_image_lightning_sigmas, qwen_image_sigmas
from diffsynth_qwen_image.config import TOKEN_FACTOR, VAE_FACTOR
from diffsynth_qwen_image.prompts import PromptImages, chat_texts, count_prefix

logger = logging.getLogger(__name__)

MAX_PROMPT_TOKENS = 1024
"""Most tokens of a prompt, with what the chat template puts after it and without images."""

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
    before, texts = chat_texts([cut_prompt(text, max_tokens=MAX_PROMPT_TOKENS) for text in distinct], prompt_images)
    dropped = count_prefix(tokenizer, before)
    tokens = tokenizer(texts, padding="longest", padding_side="right", return_tensors="pt")
    most = MAX_PROMPT_TOKENS + dropped + (0 if prompt_images is None else prompt_images.num_tokens)
    input_ids, mask = cut_tokens(tokens["input_ids"], tokens["attention_mask"], most=most)
    like = {"device": device, "dtype": dtype}
    images = {} if prompt_images is None else prompt_images.inputs(tokenizer, input_ids, like=like)
    embeds = text_encoder(input_ids.to(device), mask.to(device), **images)
    return text_only(embeds, mask, dropped=dropped, order=order)


def cut_tokens(input_ids: Tensor, mask: Tensor, *, most: int) -> tuple[Tensor, Tensor]:
    """Return (token ids, their mask), int tensors `b s`, of at most `most` tokens; a warning says what is cut."""
    if input_ids.shape[1] > most:
        logger.warning("a prompt of %d tokens is cut to %d", input_ids.shape[1], most)
    return input_ids[:, :most], mask[:, :most]


def text_only(
    embeds: Float[Tensor, "b s e"], mask: Tensor, *, dropped: int, order: Tensor
) -> tuple[Float[Tensor, "p t e"], Bool[Tensor, "p t"] | None]:
    """Return (hidden states `p t e` without those of the first `dropped` tokens, one for each prompt; their bool mask,
    or None if nothing is padded).

    Args:
        embeds: hidden states of the distinct prompts, padded on the right.
        mask: 1 for text, 0 for padding, on the CPU.
        dropped: number of first tokens to leave out.
        order: index of each prompt among the distinct ones.
    """
    kept = mask[:, dropped:].bool()
    return embeds[:, dropped:][order], None if bool(kept.all()) else kept.to(embeds.device)[order]


initial_latents = image_latents(VAE_FACTOR)

UNITS = (round_size, schedule, encode_prompt, encode_input_image, initial_latents)
