from __future__ import annotations

import math

import pytest
import torch

from diffsynth.nn.timestep import TimestepEmbedder, sinusoidal_embedding


def test_cosines_then_sines() -> None:
    got = sinusoidal_embedding(torch.tensor([0.0, 700.0]), 6)
    frequencies = [1.0, 10000 ** (-1 / 3), 10000 ** (-2 / 3)]
    truth = [math.cos(700 * f) for f in frequencies] + [math.sin(700 * f) for f in frequencies]
    assert got[0].tolist() == [1, 1, 1, 0, 0, 0]
    assert got[1].tolist() == pytest.approx(truth, abs=1e-4)


def test_sinusoids_stay_fp32_until_the_mlp() -> None:
    """In bf16, 999 and 1000 are equal; their sinusoids differ."""
    embedder = TimestepEmbedder(8, hidden_dim=16).bfloat16()
    out = embedder(torch.tensor([999.0, 1000.0]), dtype=torch.bfloat16)
    assert out.dtype == torch.bfloat16
    assert not torch.equal(out[0], out[1])
