"""Units of Qwen-Image: noise levels, and the text before a prompt."""

from __future__ import annotations

import logging
import math

import pytest
import torch

from diffsynth_qwen_image.prompts import MAX_PROMPT_TOKENS, count_prefix
from diffsynth_qwen_image.units import check_schedule, encode_prompt, schedule
from qwen_image_oracles import qwen_tokenizer

SQUARE = {"height": 1024, "width": 1024}
DEFAULTS = {"exponential_shift_mu": None, "lightning_schedule": False, "layered_schedule": False}
DEFAULTS |= {"denoising_strength": 1.0}


def test_noise_levels_of_the_reference() -> None:
    """`spec/features.md` A7: four steps."""
    sigmas = schedule(num_inference_steps=4, **SQUARE)
    assert sigmas.tolist() == pytest.approx([1, 0.76671, 0.45561, 0.02, 0], abs=1e-5)
    lightning = schedule(num_inference_steps=4, lightning_schedule=True, **SQUARE)
    assert lightning.tolist() == pytest.approx([1, 0.9, 0.75, 0.5, 0])
    assert schedule(num_inference_steps=4, height=1020, width=1010).equal(sigmas)  # sizes are rounded up
    layered = schedule(num_inference_steps=3, layered_schedule=True, **SQUARE)
    assert layered.equal(schedule(num_inference_steps=3, exponential_shift_mu=4.0, **SQUARE))
    by_mu = schedule(num_inference_steps=3, exponential_shift_mu=math.log(2.5), **SQUARE)
    assert by_mu.tolist() == pytest.approx([1, 0.6325, 0.02, 0], abs=1e-4)


def test_given_noise_levels() -> None:
    check_schedule(DEFAULTS | {"sigmas": None, "lightning_schedule": True})
    check_schedule(DEFAULTS | {"sigmas": [1.0, 0.5]})
    given = {"num_inference_steps": 2, "sigmas": [1.0, 0.5], **SQUARE}
    assert schedule(**given).tolist() == [1, 0.5, 0]
    ignored = schedule.ignores(DEFAULTS | given)
    assert set(ignored) == {"exponential_shift_mu", "lightning_schedule", "layered_schedule"}
    assert torch.equal(schedule(**given, exponential_shift_mu=1.0, lightning_schedule=True), schedule(**given))
    assert schedule.ignores(DEFAULTS | {"sigmas": None}) == {}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"sigmas": []}, "expected at least one noise level"),
        ({"sigmas": [0.5, 0.5]}, "each lower than the one before"),
        ({"sigmas": [1.0, 0.0]}, "the last step goes to 0, which is not listed"),
        ({"sigmas": [1.5, 0.5]}, r"in \(0, 1\]"),
        ({"sigmas": [1.0], "denoising_strength": 0.5}, "sigmas and denoising_strength=0.5 are given; leave out one"),
    ],
)
def test_levels_that_are_no_schedule_are_refused(changes, message) -> None:
    with pytest.raises(ValueError, match=message):
        check_schedule(DEFAULTS | changes)


class Recorder(torch.nn.Module):
    """A text encoder whose hidden states are its token ids."""

    def forward(self, input_ids, attention_mask):
        return input_ids[:, :, None].float()


def encode(prompt):
    return encode_prompt(Recorder(), qwen_tokenizer(), prompt=prompt, device=torch.device("cpu"), dtype=torch.float32)


def test_tokens_before_the_prompt_are_dropped() -> None:
    tokenizer = qwen_tokenizer()
    embeds, mask = encode("ab")
    answer = "<|im_end|>\n<|im_start|>assistant\n"
    assert mask is None
    assert tokenizer.decode(embeds[0, :, 0].long()) == f"ab{answer}"
    assert count_prefix(tokenizer, "<|im_start|>system\nx") == 9


def test_equal_prompts_are_encoded_once_and_lengths_differ() -> None:
    embeds, mask = encode(["ab", "abcd", "ab"])
    assert embeds.shape[:2] == mask.shape == (3, mask.shape[1])
    assert (mask.sum(1) - mask.sum(1).min()).tolist() == [0, 2, 0]
    assert torch.equal(embeds[0], embeds[2])


def test_a_long_prompt_is_cut(caplog) -> None:
    with caplog.at_level(logging.WARNING):
        embeds, _ = encode("x" * 1100 + "THE END")
    assert embeds.shape == (1, MAX_PROMPT_TOKENS, 1)
    assert "is cut to" in caplog.text
    assert "THE END" in caplog.text
