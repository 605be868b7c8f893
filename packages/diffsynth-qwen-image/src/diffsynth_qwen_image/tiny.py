"""Small processors and inputs of tiny models, for the tiny hub and the conformance suite. Light: no torch."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from diffsynth.testing.tiny_inputs import tiny_image

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

VISION_TOKENS = ("<|vision_start|>", "<|vision_end|>", "<|image_pad|>")


def write_tokenizer(folder: Path) -> None:
    """Write the files of `vision_tokenizer` to `folder`."""
    vision_tokenizer().save_pretrained(folder)


def vision_tokenizer() -> PreTrainedTokenizerFast:
    """Return a tokenizer of bytes, a `PreTrainedTokenizerFast`, with Qwen2.5-VL's tokens for images."""
    from diffsynth.testing.tiny_processors import byte_tokenizer

    tokenizer = byte_tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_start|>", *VISION_TOKENS]})
    return tokenizer


def write_image_processor(folder: Path) -> None:
    """Write the file of an image processor of Qwen2.5-VL, for images of at most 16 tokens, to `folder`."""
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

    Qwen2VLImageProcessorPil(min_pixels=56 * 56, max_pixels=112 * 112).save_pretrained(folder)


def layer_input(size: Mapping[str, int]) -> dict[str, Any]:
    """Return a dict of call arguments with an RGBA image, one of whose layers is computed."""
    image = tiny_image(size)
    image.putalpha(tiny_image(size, turn=1).getchannel("R"))
    return {"layer_input_image": image}


def layer_inputs(size: Mapping[str, int]) -> dict[str, Any]:
    """Return a dict of call arguments with an RGBA image to take apart into two layers."""
    return layer_input(size) | {"layer_num": 2}


def edit_inputs(size: Mapping[str, int]) -> dict[str, Any]:
    """Return a dict of call arguments with an image to edit, for a result of `size` in pixels."""
    return {"edit_image": tiny_image(size), "edit_image_auto_resize": False}


def edit_list_inputs(size: Mapping[str, int]) -> dict[str, Any]:
    """Return a dict of call arguments with two images to edit, for a result of `size` in pixels."""
    return {"edit_image": [tiny_image(size), tiny_image(size, turn=1)], "edit_image_auto_resize": False}
