"""Units of the FLUX.1 pipeline, in the order they run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from diffsynth.errors import shown
from diffsynth.runtime.image_units import encode_input_image, image_latents, image_size, set_tiling
from diffsynth.runtime.prompt_weights import (
    WeightedText,
    check_prompt_weights,
    encode_weighted,
    tokenize_weighted,
    weighted_texts,
)
from diffsynth.runtime.prompts import distinct_prompts
from diffsynth.runtime.unit import Phase, unit
from diffsynth.sampling.schedule import flux1_original_sigmas, flux1_sigmas
from diffsynth.terminal import module_logger
from diffsynth_flux.flux1.config import PATCH_SIZE, VAE_FACTOR

logger = module_logger(__name__)

MAX_T5_TOKENS = 512

EMBEDDED_GUIDANCE = 3.5
"""Default guidance of the distilled network."""

TOKEN_SIDE = PATCH_SIZE * VAE_FACTOR
"""Side of a token in pixels."""

round_size = image_size(multiple=TOKEN_SIDE)


@unit("sigmas", phase=Phase.SHAPE)
def schedule(
    *,
    num_inference_steps: int,
    denoising_strength: float = 1.0,
    sigma_shift: float | None = None,
    original_schedule: bool | None = None,
    embeds_guidance: bool = True,
    height: int,
    width: int,
) -> Float[Tensor, "steps_plus_1"]:
    """Return a tensor `steps_plus_1` of the noise levels (sigmas in [0, 1]) of the steps, falling, and a last 0."""
    if original_schedule or (original_schedule is None and not embeds_guidance):
        num_tokens = (height // TOKEN_SIDE) * (width // TOKEN_SIDE) if embeds_guidance else None
        return flux1_original_sigmas(
            num_inference_steps, num_tokens=num_tokens, shift=sigma_shift, strength=denoising_strength
        )
    shift = 3.0 if sigma_shift is None else sigma_shift
    return flux1_sigmas(num_inference_steps, shift=shift, strength=denoising_strength)


def check_guidance(values: Mapping[str, Any]) -> None:
    """Raise ValueError if a call sets a guidance for a network that takes none."""
    guidance = values["embedded_guidance"]
    if not values.get("embeds_guidance", True) and guidance != EMBEDDED_GUIDANCE:
        raise ValueError(
            f"embedded_guidance={guidance} is given, but this network takes no guidance, as FLUX.1-schnell; leave it "
            "out"
        )


@unit("embedded_guidance", phase=Phase.SHAPE, check=check_guidance)
def set_guidance(*, embedded_guidance: float = EMBEDDED_GUIDANCE) -> float:
    """Return `embedded_guidance` as a float."""
    return float(embedded_guidance)


@unit("pooled_prompt_embeds", branches={"uncond": {"prompt": "negative_prompt"}}, phase=Phase.TEXT)
def encode_pooled_prompt(
    text_encoder_1: Any,
    tokenizer_1: Any,
    *,
    prompt: str | Sequence[str] = "",
    prompt_weighting: bool = False,
    device: torch.device,
) -> Float[Tensor, "b e"]:
    """Return CLIP's pooled hidden states `b e` of the prompts, which are cut to its number of positions; what is cut is
    logged. Weights of words have no effect on them.
    """
    distinct, order = distinct_prompts(prompt, device=device)
    texts = weighted_texts(distinct, prompt_weighting=prompt_weighting, max_tokens=MAX_T5_TOKENS)
    max_tokens = text_encoder_1.config.max_tokens
    input_ids, _ = tokenize(tokenizer_1, texts, max_tokens, where=f"CLIP takes {max_tokens} tokens; T5 alone takes")
    return text_encoder_1(input_ids.to(device))[order]


@unit(
    "prompt_embeds",
    branches={"uncond": {"prompt": "negative_prompt"}},
    phase=Phase.TEXT,
    check=check_prompt_weights,
)
def encode_prompt(
    text_encoder_2: Any,
    tokenizer_2: Any,
    *,
    prompt: str | Sequence[str] = "",
    prompt_weighting: bool = False,
    t5_sequence_length: int = MAX_T5_TOKENS,
    device: torch.device,
) -> Float[Tensor, "b t e"]:
    """Return T5's hidden states `b t e` of the prompts, each cut or padded to `t5_sequence_length` tokens; what is cut
    is logged.
    """
    distinct, order = distinct_prompts(prompt, device=device)
    texts = weighted_texts(distinct, prompt_weighting=prompt_weighting, max_tokens=MAX_T5_TOKENS)
    where = f"T5 takes t5_sequence_length={t5_sequence_length} tokens; these are not used:"
    input_ids, weights = tokenize(tokenizer_2, texts, t5_sequence_length, where=where)
    padding = tokenizer_2.pad_token_id
    return encode_weighted(text_encoder_2, input_ids.to(device), weights, padding=padding)[order]


def tokenize(
    tokenizer: Any, texts: Sequence[WeightedText], max_tokens: int, *, where: str
) -> tuple[Int[Tensor, "b s"], Float[Tensor, "b s"] | None]:
    """Return (the token ids of texts, a CPU tensor `b s` with `s = max_tokens`, padded and cut; their weights, or None
    if all are 1); log text that is cut.

    Args:
        tokenizer: of transformers.
        texts: one or more.
        max_tokens: number of tokens of each text.
        where: beginning of the logged line, before the text that is cut.
    """
    tokens, weights = tokenize_weighted(
        tokenizer,
        texts,
        padding="max_length",
        max_length=max_tokens,
        truncation=True,
        return_overflowing_tokens=True,
    )
    input_ids, samples = tokens["input_ids"], tokens.get("overflow_to_sample_mapping")
    if samples is None or len(samples) == len(texts):
        return input_ids, weights
    first: dict[int, int] = {}
    rest: dict[int, list[int]] = {}
    for row, sample in enumerate(samples.tolist()):  # each row of a text has the tokens that did not fit the row before
        if first.setdefault(sample, row) != row:
            rest.setdefault(sample, []).extend(input_ids[row].tolist())
    for tokens_left in rest.values():
        logger.warning("%s %s", where, shown(tokenizer.decode(tokens_left, skip_special_tokens=True), 400))
    rows = [first[sample] for sample in range(len(texts))]
    return input_ids[rows], None if weights is None else weights[rows]


initial_latents = image_latents(VAE_FACTOR, noise_dtype=torch.float32)

UNITS = (
    round_size,
    set_tiling,
    schedule,
    set_guidance,
    encode_pooled_prompt,
    encode_prompt,
    encode_input_image,
    initial_latents,
)
