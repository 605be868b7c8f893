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
from diffsynth.runtime.prompts import cut_prompt, distinct_prompts, log_cut
from diffsynth.runtime.unit import Phase, unit
from diffsynth_wan.config import MAX_PROMPT_TOKENS

_QUOTES = str.maketrans("\u2018\u2019\u201a\u201b\u201c\u201d\u201e\u201f", "'" * 4 + '"' * 4)
_COMPATIBLE = re.compile("[\u3000\uff01-\uffe6\ufb00-\ufb06]+")
"""Full-width and half-width letters, and Latin ligatures."""

_CONTROL = re.compile("[\x00-\x08\x0b\x0e-\x1f\x7f\ufeff]")


@unit("prompt_embeds", branches={"uncond": {"prompt": "negative_prompt"}}, phase=Phase.TEXT)
def encode_prompt(
    text_encoder: Any, tokenizer: Any, *, prompt: str | Sequence[str] = "", device: torch.device
) -> Float[Tensor, "b s e"]:
    """Return the text encoder's hidden states `b s e` of the prompts, each cut (with a warning) or padded with zeros to
    512 tokens; equal prompts are encoded once.
    """
    distinct, order = distinct_prompts(prompt, device=device)
    embeds = torch.cat([encode_text(text_encoder, tokenizer, text, device) for text in distinct])
    return embeds[order]


def encode_text(text_encoder: Any, tokenizer: Any, text: str, device: torch.device) -> Float[Tensor, "1 s e"]:
    """Return the text encoder's hidden states `1 s e` of one text, cut (with a warning) or padded with zeros to 512
    tokens.
    """
    text = clean_prompt(cut_prompt(text, max_tokens=MAX_PROMPT_TOKENS))
    tokens = tokenizer([text], add_special_tokens=True, return_tensors="pt")["input_ids"]
    if tokens.shape[1] > MAX_PROMPT_TOKENS:
        log_cut(tokenizer, tokens[0].tolist(), most=MAX_PROMPT_TOKENS)
        # Keep the last token, which marks the end of the text.
        tokens = torch.cat([tokens[:, : MAX_PROMPT_TOKENS - 1], tokens[:, -1:]], dim=1)
    hidden = text_encoder(tokens.to(device))
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
