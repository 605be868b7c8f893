"""Texts that the text encoder gets, with images and without."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from jaxtyping import Float, Int
from torch import Tensor

IMAGE_TOKEN = "<|image_pad|>"
"""Token that a merged square of patches of an image takes the place of."""

SYSTEM_MESSAGE = (
    "Describe the image by detailing the color, shape, size, texture, quantity, text, spatial relationships of the "
    "objects and background:"
)
"""Message before every prompt without images, as in training."""

ANSWER = "<|im_end|>\n<|im_start|>assistant\n"
"""Text after every prompt: the end of the user's message and the start of an answer."""


@dataclass(frozen=True, eq=False)
class PromptImages:
    """Images that the text encoder reads with each prompt.

    Args:
        system: message before the prompt.
        text: what is put before the prompt, with `IMAGE_TOKEN` as often as the images have tokens.
        patches: pixel values of the patches of all images.
        grids: rows and columns of the patches of each image.
    """

    system: str
    text: str
    patches: Float[Tensor, "p v"]
    grids: tuple[tuple[int, int], ...]

    @property
    def num_tokens(self) -> int:
        """Number of tokens of the images in one text."""
        return self.text.count(IMAGE_TOKEN)

    def inputs(self, tokenizer: Any, input_ids: Int[Tensor, "b s"], *, like: dict[str, Any]) -> dict[str, Any]:
        """Return a dict of the arguments of `Qwen25VLTextEncoder.forward` for texts that each have all images.

        Args:
            tokenizer: that made the token ids.
            input_ids: of the texts, on the CPU.
            like: device and dtype of the patches, arguments of `Tensor.to`.

        Raises:
            ValueError: the tokenizer does not know `IMAGE_TOKEN`, or the texts are cut before the end of the images.
        """
        count = len(input_ids)
        mask = input_ids == tokenizer.convert_tokens_to_ids(IMAGE_TOKEN)
        expected = count * self.num_tokens
        if int(mask.sum()) != expected:
            raise ValueError(
                f"the texts have {int(mask.sum())} tokens {IMAGE_TOKEN}; expected {expected}. The tokenizer must be "
                f"that of Qwen2.5-VL, and a prompt must not contain {IMAGE_TOKEN}"
            )
        return {"patches": self.patches.repeat(count, 1).to(**like), "grids": self.grids * count, "image_mask": mask}


def image_text(count: int) -> str:
    """Return the text that stands for an image of `count` tokens."""
    return f"<|vision_start|>{IMAGE_TOKEN * count}<|vision_end|>"


def text_before(system: str) -> str:
    """Return the text before a prompt: a system message, and the start of the user's message."""
    return f"<|im_start|>system\n{system}<|im_end|>\n<|im_start|>user\n"


def chat_texts(prompts: Sequence[str], images: PromptImages | None) -> tuple[str, list[str]]:
    """Return (the text before the prompts, whose hidden states the transformer does not get; a list of the whole
    texts).

    The template in the tokenizer's folder is a program, and is not run.

    Args:
        prompts: of the user.
        images: read with each prompt; None for text alone.
    """
    before = text_before(SYSTEM_MESSAGE if images is None else images.system)
    before_prompt = "" if images is None else images.text
    return before, [f"{before}{before_prompt}{prompt}{ANSWER}" for prompt in prompts]


def count_prefix(tokenizer: Any, before: str) -> int:
    """Return the number of tokens of the text before a prompt.

    Args:
        tokenizer: of the text encoder.
        before: the text; `ANSWER`, which begins with a special token, may follow it without changing its tokens.
    """
    with_prefix, without = (len(tokenizer(text)["input_ids"]) for text in (before + ANSWER, ANSWER))
    return with_prefix - without
