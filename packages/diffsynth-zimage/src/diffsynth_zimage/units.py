"""Units of the Z-Image pipeline, in the order they run."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from diffsynth.runtime.image_units import encode_input_image, image_latents, image_size, set_tiling
from diffsynth.runtime.images import Images, image_list
from diffsynth.runtime.prompt_weights import (
    WeightedText,
    check_prompt_weights,
    encode_weighted,
    tokenize_weighted,
    weighted_texts,
)
from diffsynth.runtime.prompts import log_cut
from diffsynth.runtime.unit import Phase, unit
from diffsynth.sampling.schedule import z_image_sigmas
from diffsynth_zimage.config import MAX_PROMPT_TOKENS, VAE_FACTOR
from diffsynth_zimage.tokens import PromptMask

_IMAGE_BEGIN, _IMAGE_END = "<|vision_start|>", "<|vision_end|>"

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


@unit(
    "prompt_embeds",
    "prompt_mask",
    branches={"uncond": {"prompt": "negative_prompt"}},
    phase=Phase.TEXT,
    check=check_prompt_weights,
)
def encode_prompt(
    text_encoder: Any,
    tokenizer: Any,
    *,
    prompt: str | Sequence[str] = "",
    prompt_weighting: bool = False,
    edit_image: Images = None,
    device: torch.device,
) -> tuple[Float[Tensor, "b s e"], PromptMask]:
    """Return (hidden states `b s e` of the prompts, mask `b s`: True for text, False for padding to the longest prompt;
    with reference images the number of the caption's segment, and 0).

    Equal segments are encoded once; those over `MAX_PROMPT_TOKENS` are cut with a warning.
    """
    prompts = [prompt] if isinstance(prompt, str) else list(prompt)
    count = len(image_list(edit_image))
    weighted = weighted_texts(prompts, prompt_weighting=prompt_weighting, max_tokens=MAX_PROMPT_TOKENS)
    captions = [_segments(text, images=count) for text in weighted]
    texts = list(dict.fromkeys(segment for caption in captions for segment in caption))
    # With causal attention, padding after the text does not change its hidden states.
    tokens, weights = tokenize_weighted(tokenizer, texts, padding="longest", padding_side="right")
    input_ids, mask = tokens["input_ids"], tokens["attention_mask"]
    if input_ids.shape[1] > MAX_PROMPT_TOKENS:
        for ids, kept in zip(input_ids, mask.bool(), strict=True):
            log_cut(tokenizer, ids[kept].tolist(), most=MAX_PROMPT_TOKENS)
        input_ids, mask = input_ids[:, :MAX_PROMPT_TOKENS], mask[:, :MAX_PROMPT_TOKENS]
        weights = None if weights is None else weights[:, :MAX_PROMPT_TOKENS]
    on_device, padding = mask.to(device), tokenizer.pad_token_id
    embeds = encode_weighted(lambda ids: text_encoder(ids, on_device), input_ids.to(device), weights, padding=padding)
    order = torch.tensor([[texts.index(segment) for segment in caption] for caption in captions])
    if order.shape[1] == 1:
        order = order[:, 0].to(device)
        return embeds[order], mask.to(device, torch.bool)[order]
    lengths = mask.sum(1).tolist()
    rows = [torch.cat([embeds[text, : lengths[text]] for text in caption]) for caption in order.tolist()]
    numbers = [
        torch.repeat_interleave(torch.arange(1, order.shape[1] + 1), torch.tensor([lengths[text] for text in caption]))
        for caption in order.tolist()
    ]
    return pad_sequence(rows, batch_first=True), pad_sequence(numbers, batch_first=True).to(device)


def _segments(prompt: WeightedText, *, images: int) -> tuple[WeightedText, ...]:
    """Return a tuple of `WeightedText`s: the `chat_segments` of a prompt, with its weights."""
    of_prompt = -2 if images else 0
    segments = [WeightedText(segment) for segment in chat_segments(prompt.text, images=images)]
    segments[of_prompt] = prompt.within(lambda text: chat_segments(text, images=images)[of_prompt])
    return tuple(segments)


def chat_segments(prompt: str, *, images: int) -> tuple[str, ...]:
    """Return a tuple of str: `prompt` as one user message in Qwen3's chat template, with thinking enabled as in
    training, followed by the start of an answer; with reference images, the segments of this text between them.

    The template in the tokenizer's folder is a program, and is not run.

    Args:
        prompt: of the user.
        images: number of reference images, which stand before the prompt. The image that is computed stands in the
            answer.
    """
    begin, end = "<|im_start|>user\n", f"{prompt}<|im_end|>\n<|im_start|>assistant\n"
    if not images:
        return (begin + end,)
    first, between = f"{begin}{_IMAGE_BEGIN}", f"{_IMAGE_END}{_IMAGE_BEGIN}"
    return (first, *[between] * (images - 1), f"{_IMAGE_END}{end}{_IMAGE_BEGIN}", f"{_IMAGE_END}<|im_end|>")


initial_latents = image_latents(VAE_FACTOR)

UNITS = (round_size, set_tiling, schedule, encode_prompt, encode_input_image, initial_latents)
