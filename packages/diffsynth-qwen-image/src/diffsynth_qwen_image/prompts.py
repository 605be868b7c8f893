"""Tokens that the text encoder gets of prompts, with images and without."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor

from diffsynth.runtime.prompt_weights import WeightedText, tokenize_weighted
from diffsynth.runtime.prompts import log_cut

MAX_PROMPT_TOKENS = 1024
"""Most tokens of a prompt, with what the chat template puts after it and without images."""

SYSTEM_MESSAGE = (
    "Describe the image by detailing the color, shape, size, texture, quantity, text, spatial relationships of the "
    "objects and background:"
)
"""Message before every prompt without images, as in training."""

ANSWER = "<|im_end|>\n<|im_start|>assistant\n"
"""Text after every prompt: the end of the user's message and the start of an answer."""

VISION_START, VISION_END = "<|vision_start|>", "<|vision_end|>"
"""Special tokens before and after the tokens of an image."""


@dataclass(frozen=True, eq=False)
class PromptImages:
    """Images that the text encoder reads with each prompt.

    Args:
        system: message before the prompt.
        captions: text before each image.
        counts: number of tokens of each image.
        patches: pixel values of the patches of all images.
        grids: rows and columns of the patches of each image.
    """

    system: str
    captions: tuple[str, ...]
    counts: tuple[int, ...]
    patches: Float[Tensor, "p v"]
    grids: tuple[tuple[int, int], ...]


@dataclass(frozen=True, eq=False)
class PromptTokens:
    """Tokens of several prompts, on the CPU, padded on the right.

    Args:
        input_ids: token ids; those of images are 0, as their embeddings are not used.
        mask: 1 for text and images, 0 for padding.
        image_mask: True for tokens of images.
        weights: of the tokens; None if all are 1.
        dropped: number of first tokens whose hidden states the transformer does not get.
    """

    input_ids: Int[Tensor, "b s"]
    mask: Int[Tensor, "b s"]
    image_mask: Bool[Tensor, "b s"]
    weights: Float[Tensor, "b s"] | None
    dropped: int


def text_before(system: str) -> str:
    """Return the text before a prompt: a system message, and the start of the user's message."""
    return f"<|im_start|>system\n{system}<|im_end|>\n<|im_start|>user\n"


def segments(images: PromptImages | None) -> list[str]:
    """Return the texts before each image, and the text between the last image and the prompt.

    The template in the tokenizer's folder is a program, and is not run.

    Args:
        images: read with each prompt; None for text alone, which has one segment.
    """
    if images is None:
        return [text_before(SYSTEM_MESSAGE)]
    ends = [text_before(images.system), *(VISION_END for _ in images.captions)]
    return [f"{end}{caption}{VISION_START}" for end, caption in zip(ends, images.captions, strict=False)] + ends[-1:]


def tokenize(tokenizer: Any, prompts: Sequence[WeightedText], images: PromptImages | None) -> PromptTokens:
    """Return the `PromptTokens` of prompts; a prompt over `MAX_PROMPT_TOKENS` is cut with a warning.

    Each segment of the text begins with a special token, so that its tokens are those that it has in the whole text.

    Args:
        tokenizer: of Qwen2.5-VL.
        prompts: of the user.
        images: read with each prompt; None for text alone.
    """
    system = SYSTEM_MESSAGE if images is None else images.system
    dropped = count_prefix(tokenizer, text_before(system))
    *before, last = segments(images)
    head, image_head = [], []
    for text, count in zip(before, () if images is None else images.counts, strict=True):
        ids = _ids(tokenizer, text)
        head += [ids, ids.new_zeros(count)]
        image_head += [torch.zeros(len(ids), dtype=torch.bool), torch.ones(count, dtype=torch.bool)]
    texts = [prompt.within(lambda text: f"{last}{text}{ANSWER}") for prompt in prompts]
    tokens, weights = tokenize_weighted(tokenizer, texts, padding="longest", padding_side="right")
    most = MAX_PROMPT_TOKENS + (dropped if images is None else 0)
    if tokens["input_ids"].shape[1] > most:
        for ids, kept in zip(tokens["input_ids"], tokens["attention_mask"].bool(), strict=True):
            log_cut(tokenizer, ids[kept].tolist(), most=most)
    input_ids, mask = tokens["input_ids"][:, :most], tokens["attention_mask"][:, :most]
    weights = None if weights is None else weights[:, :most]
    image_mask = torch.zeros_like(mask, dtype=torch.bool)
    if head:
        first, first_images = torch.cat(head), torch.cat(image_head)
        input_ids = torch.cat((first.expand(len(input_ids), -1), input_ids), dim=1)
        mask = torch.cat((mask.new_ones(len(mask), len(first)), mask), dim=1)
        image_mask = torch.cat((first_images.expand(len(image_mask), -1), image_mask), dim=1)
        weights = None if weights is None else F.pad(weights, (len(first), 0), value=1.0)
    return PromptTokens(input_ids, mask, image_mask, weights, dropped)


def count_prefix(tokenizer: Any, before: str) -> int:
    """Return the number of tokens of the text before a prompt.

    Args:
        tokenizer: of the text encoder.
        before: the text; `ANSWER`, which begins with a special token, may follow it without changing its tokens.
    """
    return len(_ids(tokenizer, before + ANSWER)) - len(_ids(tokenizer, ANSWER))


def _ids(tokenizer: Any, text: str) -> Int[Tensor, "s"]:
    return tokenizer([text], return_tensors="pt")["input_ids"][0]
