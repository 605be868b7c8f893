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

logger = logging.getLogger(__name__)

MAX_PROMPT_TOKENS = 1024
"""Most tokens of a prompt, with what the chat template puts after it."""

SYSTEM_MESSAGE = (
    "Describe the image by detailing the color, shape, size, texture, quantity, text, spatial relationships of the "
    "objects and background:"
)
"""Message before every prompt, as in training."""

ANSWER = "<|im_end|>\n<|im_start|>assistant\n"
"""Text after every prompt: the end of the user's message and the start of an answer."""

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
    text_encoder: Any, tokenizer: Any, *, prompt: str | Sequence[str] = "", device: torch.device
) -> tuple[Float[Tensor, "b s e"], Bool[Tensor, "b s"] | None]:
    """Return (hidden states `b s e` of the prompts, bool mask `b s`, True for text, False for padding to the longest
    prompt, or None if nothing is padded); prompts over `MAX_PROMPT_TOKENS` are cut with a warning, equal ones encoded
    once.
    """
    distinct, order = distinct_prompts(prompt, device=device)
    before = f"<|im_start|>system\n{SYSTEM_MESSAGE}<|im_end|>\n<|im_start|>user\n"
    texts = [f"{before}{cut_prompt(text, max_tokens=MAX_PROMPT_TOKENS)}{ANSWER}" for text in distinct]
    dropped = count_prefix(tokenizer, before)
    tokens = tokenizer(texts, padding="longest", padding_side="right", return_tensors="pt")
    input_ids, mask = cut_tokens(tokens["input_ids"], tokens["attention_mask"], most=MAX_PROMPT_TOKENS + dropped)
    embeds = text_encoder(input_ids.to(device), mask.to(device))
    return text_only(embeds, mask, dropped=dropped, order=order)


def count_prefix(tokenizer: Any, before: str) -> int:
    """Return the number of tokens of the text before a prompt, whose hidden states the transformer does not get.

    Args:
        tokenizer: of the text encoder.
        before: the text; `ANSWER`, which begins with a special token, may follow it without changing its tokens.
    """
    with_prefix, without = (len(tokenizer(text)["input_ids"]) for text in (before + ANSWER, ANSWER))
    return with_prefix - without


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
