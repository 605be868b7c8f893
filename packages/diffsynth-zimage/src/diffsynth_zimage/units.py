"""Units of the Z-Image pipeline, in the order they run."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from diffsynth.runtime.image_units import encode_input_image, image_latents, image_size
from diffsynth.runtime.prompts import cut_prompt, distinct_prompts
from diffsynth.runtime.unit import Phase, unit
from diffsynth.sampling.schedule import z_image_sigmas
from diffsynth.terminal import module_logger
from diffsynth_zimage.config import MAX_PROMPT_TOKENS, VAE_FACTOR

logger = module_logger(__name__)

round_size = image_size(multiple=16)


@unit("sigmas", phase=Phase.SHAPE)
def schedule(
    *, num_inference_steps: int, denoising_strength: float = 1.0, sigma_shift: float | None = None
) -> Float[Tensor, "steps_plus_1"]:
    """Return a tensor `steps_plus_1` of the noise levels (sigmas in [0, 1]) of the steps, falling, and a last 0; a
    `sigma_shift` of None means 3.
    """
    shift = 3.0 if sigma_shift is None else sigma_shift
    return z_image_sigmas(num_inference_steps, shift=shift, strength=denoising_strength)


@unit("prompt_embeds", "prompt_mask", branches={"uncond": {"prompt": "negative_prompt"}}, phase=Phase.TEXT)
def encode_prompt(
    text_encoder: Any, tokenizer: Any, *, prompt: str | Sequence[str] = "", device: torch.device
) -> tuple[Float[Tensor, "b s e"], Bool[Tensor, "b s"]]:
    """Return (hidden states `b s e` of the prompts, bool mask `b s`, True for text, False for padding to the longest
    prompt); prompts over `MAX_PROMPT_TOKENS` are cut with a warning, equal ones encoded once.
    """
    distinct, order = distinct_prompts(prompt, device=device)
    tokens = tokenizer(
        [chat_text(cut_prompt(text, max_tokens=MAX_PROMPT_TOKENS)) for text in distinct],
        padding="longest",
        padding_side="right",  # with causal attention, padding after the text does not change its hidden states
        return_tensors="pt",
    )
    input_ids, mask = tokens["input_ids"], tokens["attention_mask"]
    if input_ids.shape[1] > MAX_PROMPT_TOKENS:
        logger.warning("a prompt of %d tokens is cut to %d", input_ids.shape[1], MAX_PROMPT_TOKENS)
        input_ids, mask = input_ids[:, :MAX_PROMPT_TOKENS], mask[:, :MAX_PROMPT_TOKENS]
    embeds = text_encoder(input_ids.to(device), mask.to(device))
    return embeds[order], mask.to(device, torch.bool)[order]


def chat_text(prompt: str) -> str:
    """Return a str: `prompt` as one user message in Qwen3's chat template, with thinking enabled as in training,
    followed by the start of an answer.

    The template in the tokenizer's folder is a program, and is not run.
    """
    return f"<|im_start|>user\n{prompt}<|im_end|>\n<|im_start|>assistant\n"


initial_latents = image_latents(VAE_FACTOR)

UNITS = (round_size, schedule, encode_prompt, encode_input_image, initial_latents)
