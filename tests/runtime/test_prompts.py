"""Prompts that are longer than any text encoder takes."""

from __future__ import annotations

import logging

from diffsynth.runtime.prompts import cut_prompt


def test_a_prompt_of_megabytes_is_cut_before_it_is_tokenized(caplog):
    with caplog.at_level(logging.WARNING):
        assert cut_prompt("ab" * 2**20, max_tokens=512) == "ab" * 25600
    assert "a prompt of 2097152 characters is cut to 51200" in caplog.text


def test_a_usual_prompt_is_not_changed(caplog):
    text = "a" * 51200
    assert cut_prompt(text, max_tokens=512) is text
    assert not caplog.records
