"""Encoding of the prompt."""

from __future__ import annotations

import html
import re
import unicodedata
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from diffsynth.runtime.guidance import ignored_without_guidance
from diffsynth.runtime.prompt_weights import check_prompt_weights, encode_weighted, tokenize_weighted, weighted_texts
from diffsynth.runtime.prompts import distinct_prompts, log_cut
from diffsynth.runtime.unit import Phase, unit
from diffsynth_wan.config import MAX_PROMPT_TOKENS

_QUOTES = str.maketrans("\u2018\u2019\u201a\u201b\u201c\u201d\u201e\u201f", "'" * 4 + '"' * 4)
_COMPATIBLE = re.compile("[\u3000\uff01-\uffe6\ufb00-\ufb06]+")
"""Full-width and half-width letters, and Latin ligatures."""

_CONTROL = re.compile("[\x00-\x08\x0b\x0e-\x1f\x7f\ufeff]")


@unit(
    "prompt_embeds",
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
    device: torch.device,
) -> Float[Tensor, "b s e"]:
    """Return the text encoder's hidden states `b s e` of the prompts, each cut (with a warning) or padded with zeros to
    512 tokens; equal prompts are encoded once.
    """
    distinct, order = distinct_prompts(prompt, device=device)
    options = {"prompt_weighting": prompt_weighting, "device": device}
    return torch.cat([encode_text(text_encoder, tokenizer, text, **options) for text in distinct])[order]


def encode_text(
    text_encoder: Any, tokenizer: Any, text: str, *, prompt_weighting: bool, device: torch.device
) -> Float[Tensor, "1 s e"]:
    """Return the text encoder's hidden states `1 s e` of one text, cut (with a warning) or padded with zeros to 512
    tokens; with `prompt_weighting`, brackets in it are weights.
    """
    texts = weighted_texts([clean_prompt(text)], prompt_weighting=prompt_weighting, max_tokens=MAX_PROMPT_TOKENS)
    tokens, weights = tokenize_weighted(tokenizer, texts, add_special_tokens=True)
    input_ids = tokens["input_ids"]
    if input_ids.shape[1] > MAX_PROMPT_TOKENS:
        log_cut(tokenizer, input_ids[0].tolist(), most=MAX_PROMPT_TOKENS)
        # Keep the last token, which marks the end of the text.
        input_ids = torch.cat([input_ids[:, : MAX_PROMPT_TOKENS - 1], input_ids[:, -1:]], dim=1)
        weights = None if weights is None else F.pad(weights[:, : MAX_PROMPT_TOKENS - 1], (0, 1), value=1.0)
    hidden = encode_weighted(text_encoder, input_ids.to(device), weights, padding=tokenizer.pad_token_id)
    return F.pad(hidden, (0, 0, 0, MAX_PROMPT_TOKENS - hidden.shape[1]))


def clean_prompt(text: str) -> str:
    """Return `text`, a str, cleaned as in Wan's training: no HTML entities, plain quotes, normal width, single spaces.

    The published code runs `ftfy.fix_text`; this gives the same for text whose encoding is not broken.
    """
    text = html.unescape(html.unescape(text)).translate(_QUOTES)
    text = _COMPATIBLE.sub(lambda found: unicodedata.normalize("NFKC", found[0]), text)
    text = unicodedata.normalize("NFC", _CONTROL.sub("", text))
    return re.sub(r"\s+", " ", text).strip()


@unit("is_cond", "is_cond_of_uncond", phase=Phase.SHAPE)
def mark_branches() -> tuple[bool, bool]:
    """Return `(True, False)`, the values of `is_cond` for the conditional and the unconditional branch of guidance."""
    return True, False


@unit("merges_branches", phase=Phase.SHAPE, ignores=ignored_without_guidance("cfg_merge"))
def merge_branches(*, cfg_merge: bool = False) -> bool:
    """Return `cfg_merge`: whether prompt and negative prompt go through the network as one batch."""
    return cfg_merge
