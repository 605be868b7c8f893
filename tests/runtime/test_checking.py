"""Warnings that a call logs about its arguments."""

from __future__ import annotations

import logging

import pytest
import torch

from toy_pipeline import toy_pipeline


@pytest.mark.parametrize("seed", [2**32, 2**40 + 7, 2**63, 2**64 - 1])
def test_seeds_of_more_bits_than_the_generator_reads(caplog, seed):
    def first_step(seed):
        found = []
        toy_pipeline()("abc", seed=seed, on_step=lambda step: found.append(step.latents))
        return found[0]

    with caplog.at_level(logging.WARNING):
        large = first_step(seed)
    low = seed % 2**32
    assert f"seed={seed}: the generator of the CPU reads the lowest 32 bits, so the noise is that of seed={low}" in (
        caplog.text
    )
    caplog.clear()
    assert torch.equal(large, first_step(low))
    assert not torch.equal(large, first_step(low ^ 1))
    assert "reads the lowest" not in caplog.text
