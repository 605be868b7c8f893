"""Templates of prompts and the tokens before a prompt equal those of diffusers' pipelines (0.42)."""

from __future__ import annotations

import inspect

import pytest
import torch
from diffusers import (
    QwenImageControlNetPipeline,
    QwenImageEditPipeline,
    QwenImageEditPlusPipeline,
    QwenImageInpaintPipeline,
    QwenImageLayeredPipeline,
    QwenImagePipeline,
)
from tokenizers import Regex, Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from diffsynth.runtime.prompt_weights import WeightedText, parse_weights
from diffsynth_qwen_image.features import edit
from diffsynth_qwen_image.prompts import ANSWER, PromptImages, count_prefix, segments, text_before, tokenize
from qwen_image_oracles import counted_prefix, qwen_tokenizer

IMAGE = "<|vision_start|><|image_pad|><|vision_end|>"
TEXT_ONLY = (QwenImagePipeline, QwenImageInpaintPipeline, QwenImageControlNetPipeline, QwenImageLayeredPipeline)
WITH_IMAGES = (QwenImageEditPipeline, QwenImageEditPlusPipeline)


def oracle_of(kind: type) -> object:
    """Return a pipeline of diffusers without components, for its template and the number of tokens that it drops."""
    names = inspect.signature(kind.__init__).parameters
    return kind(**{name: None for name in names if name != "self"})


def word_tokenizer(texts: list[str]) -> PreTrainedTokenizerFast:
    """Return a tokenizer that splits texts into words as Qwen2.5-VL's does, with one token for each word of `texts`.

    In the published vocabulary each word of the templates is one token, too.
    """
    words = (
        r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}"
        r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
    )
    splitter = pre_tokenizers.Split(Regex(words), "isolated")
    found = dict.fromkeys(word for text in texts for word, _ in splitter.pre_tokenize_str(text))
    vocabulary = {word: index for index, word in enumerate(["<unknown>", *found])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unknown>"))
    tokenizer.pre_tokenizer = splitter
    special = ["<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>", "<|image_pad|>"]
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<|endoftext|>", additional_special_tokens=special
    )


@pytest.mark.parametrize("kind", TEXT_ONLY)
def test_prompts_without_images(kind) -> None:
    """The text, its token ids, and those that are dropped, with a vocabulary of bytes and with one of words."""
    oracle, tokenizer = oracle_of(kind), qwen_tokenizer()
    (before,), template = segments(None), oracle.prompt_template_encode
    assert f"{before}a hat{ANSWER}" == template.format("a hat")
    tokens = tokenize(tokenizer, [WeightedText("a hat")], None)
    assert torch.equal(tokens.input_ids, tokenizer([template.format("a hat")], return_tensors="pt")["input_ids"])
    assert tokens.dropped == counted_prefix(tokenizer, template)
    words = word_tokenizer([before, ANSWER])
    assert tokenize(words, [WeightedText("a hat")], None).dropped == oracle.prompt_template_encode_start_idx == 34


@pytest.mark.parametrize("kind", WITH_IMAGES)
def test_the_prefix_of_prompts_with_images(kind) -> None:
    """The tokens of images are not dropped, though they stand before the prompt; the text is tested with the edits."""
    oracle, before = oracle_of(kind), text_before(edit.SYSTEM_MESSAGE)
    assert oracle.prompt_template_encode.startswith(before)
    words = word_tokenizer([before, ANSWER, "Image 1: "])
    images = PromptImages(edit.SYSTEM_MESSAGE, ("Image 1: ",), (3,), torch.zeros(12, 4), ((2, 6),))
    tokens = tokenize(words, [WeightedText("a hat")], images)
    assert tokens.dropped == count_prefix(words, before) == oracle.prompt_template_encode_start_idx == 64
    assert tokens.image_mask.sum() == 3
    assert not tokens.image_mask[:, : tokens.dropped].any()


def test_words_after_images_have_their_weights() -> None:
    tokenizer = qwen_tokenizer()
    images = PromptImages(edit.SYSTEM_MESSAGE, ("Image 1: ",), (3,), torch.zeros(12, 4), ((2, 6),))
    tokens = tokenize(tokenizer, [parse_weights("a (hat:2)")], images)
    assert tokens.weights.shape == tokens.input_ids.shape
    assert tokenizer.decode(tokens.input_ids[tokens.weights == 2]) == "hat"
    assert (tokens.weights == 1).sum() == tokens.weights.numel() - 3
