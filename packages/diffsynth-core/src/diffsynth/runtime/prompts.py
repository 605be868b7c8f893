"""Prompts before they become tokens."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Int
from torch import Tensor

from diffsynth.terminal import module_logger

logger = module_logger(__name__)

CHARACTERS_PER_TOKEN = 100
"""More characters than a token has on average in any text: a word of English has 4 to a token."""


def cut_prompt(text: str, *, max_tokens: int) -> str:
    """Return the first `100 * max_tokens` characters of `text`, with a warning if it has more.

    A tokenizer takes hundreds of bytes for each character, so a prompt is cut before it is tokenized. The text encoder
    takes `max_tokens` tokens only.

    Args:
        text: the prompt.
        max_tokens: number of tokens that the text encoder takes.
    """
    most = CHARACTERS_PER_TOKEN * max_tokens
    if len(text) <= most:
        return text
    logger.warning("a prompt of %d characters is cut to %d", len(text), most)
    return text[:most]


def distinct_prompts(
    prompt: str | Sequence[str], *, device: torch.device | str
) -> tuple[list[str], Int[Tensor, " prompts"]]:
    """Return (the different prompts, a tensor on `device` of the index of each prompt's text among them), so that equal
    prompts are encoded once: `encoded[index]` has an entry for each prompt.
    """
    prompts = [prompt] if isinstance(prompt, str) else list(prompt)
    distinct = list(dict.fromkeys(prompts))
    return distinct, torch.tensor([distinct.index(text) for text in prompts], device=device)
