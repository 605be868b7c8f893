"""Encoded prompts equal those of diffusers' pipeline."""

from __future__ import annotations

import logging

import pytest
import torch

from diffsynth_wan.tiny import tiny_tokenizer
from diffsynth_wan.units.prompt import clean_prompt, encode_prompt
from parity import TOLERANCE, relative_error
from wan_oracles import TEXT_DIM, oracle_text_encoder, our_text_encoder


@pytest.fixture(scope="module")
def encoders():
    oracle = oracle_text_encoder()
    return our_text_encoder(oracle), oracle


def encode(encoder, prompts):
    return encode_prompt(encoder, tiny_tokenizer(), prompt=prompts, device=torch.device("cpu"))


@torch.no_grad()
def test_equals_padding_and_a_mask(encoders):
    """diffusers encodes all 512 tokens with a mask and drops the padding; we encode only the text."""
    ours, oracle = encoders
    prompts = ["a puppy", "", "a much longer prompt about a puppy on a lawn"]
    tokens = tiny_tokenizer()(prompts, padding="max_length", max_length=512, truncation=True, return_tensors="pt")
    hidden = oracle(tokens.input_ids, tokens.attention_mask).last_hidden_state
    expected = hidden * tokens.attention_mask[:, :, None]
    got = encode(ours, prompts)
    assert got.shape == (3, 512, TEXT_DIM)
    assert relative_error(got, expected) < TOLERANCE
    assert torch.equal(got[0, 8:], torch.zeros(504, TEXT_DIM))


@torch.no_grad()
def test_a_long_prompt_is_cut_and_keeps_its_end(encoders, caplog):
    ours, oracle = encoders
    with caplog.at_level(logging.WARNING):
        got = encode(ours, "x" * 600)
    assert "a prompt of 601 tokens is cut to 512" in caplog.text
    tokens = tiny_tokenizer()(["x" * 600], max_length=512, truncation=True, return_tensors="pt").input_ids
    assert tokens[0, -1] == 1
    assert relative_error(got, oracle(tokens).last_hidden_state) < TOLERANCE


def test_equal_prompts_are_encoded_once(encoders, monkeypatch):
    ours, _ = encoders
    calls = []
    monkeypatch.setattr(ours, "forward", lambda ids: calls.append(ids) or torch.ones(*ids.shape, TEXT_DIM))
    assert encode(ours, ["a", "b", "a"]).shape[0] == 3
    assert len(calls) == 2


@pytest.mark.parametrize(
    ("text", "clean"),
    [
        ("  a\n\n puppy\t runs ", "a puppy runs"),
        ("fish &amp;amp; chips", "fish & chips"),
        ("the dog\u2019s \u201cbone\u201d", 'the dog\'s "bone"'),
        ("\uff21\uff22\uff0c\u3000\u753b\u9762", "AB, \u753b\u9762"),
        ("\ufb01ne caf\u0065\u0301", "fine caf\u00e9"),
        ("a\x00b\ufeffc", "abc"),
        ("\u8272\u8c03\u8273\u4e3d", "\u8272\u8c03\u8273\u4e3d"),
    ],
)
def test_clean(text, clean):
    assert clean_prompt(text) == clean
