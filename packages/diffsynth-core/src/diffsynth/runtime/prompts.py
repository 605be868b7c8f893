"""Prompts before they become tokens."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor

from diffsynth.errors import shown
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


def log_cut(tokenizer: Any, ids: Sequence[int], *, most: int) -> None:
    """Log a warning with the end of a text that does not fit a text encoder; nothing if it has `most` tokens or fewer.

    Args:
        tokenizer: that made the tokens.
        ids: token ids of the whole text, without padding.
        most: number of tokens that the text encoder takes, the first ones.
    """
    if len(ids) > most:
        cut = shown(tokenizer.decode(ids[most:], skip_special_tokens=True), 400)
        logger.warning("a prompt of %d tokens is cut to %d; left out: %s", len(ids), most, cut)


def distinct_prompts(
    prompt: str | Sequence[str], *, device: torch.device | str
) -> tuple[list[str], Int[Tensor, " prompts"]]:
    """Return (the different prompts, a tensor on `device` of the index of each prompt's text among them), so that equal
    prompts are encoded once: `encoded[index]` has an entry for each prompt.
    """
    prompts = [prompt] if isinstance(prompt, str) else list(prompt)
    distinct = list(dict.fromkeys(prompts))
    return distinct, torch.tensor([distinct.index(text) for text in prompts], device=device)
