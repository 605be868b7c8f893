"""Prompts that are longer than any text encoder takes."""

from __future__ import annotations

import logging

from diffsynth.runtime.prompts import cut_prompt, distinct_prompts, log_cut
from diffsynth.testing.tiny_processors import byte_tokenizer


def test_a_prompt_of_megabytes_is_cut_before_it_is_tokenized(caplog):
    with caplog.at_level(logging.WARNING):
        assert cut_prompt("ab" * 2**20, max_tokens=512) == "ab" * 25600
    assert "a prompt of 2097152 characters is cut to 51200" in caplog.text


def test_a_usual_prompt_is_not_changed(caplog):
    text = "a" * 51200
    assert cut_prompt(text, max_tokens=512) is text
    assert not caplog.records


def test_what_a_text_encoder_does_not_get_is_logged(caplog):
    tokenizer = byte_tokenizer()
    ids = tokenizer("a red apple on a table")["input_ids"]
    with caplog.at_level(logging.WARNING):
        log_cut(tokenizer, ids, most=12)
    assert caplog.messages == ["a prompt of 22 tokens is cut to 12; left out: 'on a table'"]
    log_cut(tokenizer, ids, most=22)
    assert len(caplog.messages) == 1


def test_equal_prompts_are_encoded_once():
    distinct, index = distinct_prompts(["a", "b", "a"], device="cpu")
    assert (distinct, index.tolist()) == (["a", "b"], [0, 1, 0])
    assert distinct_prompts("a", device="cpu")[0] == ["a"]
