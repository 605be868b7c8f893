"""The posterior of diffusers' autoencoders, from which its pipelines draw."""

from __future__ import annotations

import pytest
from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution


def encode_to_the_mean(monkeypatch: pytest.MonkeyPatch) -> None:
    """Have diffusers' autoencoder return the mean of the posterior, as ours does, where it would draw a sample.

    DiffSynth-Studio takes the mean, too; a sample adds noise that neither program draws from the seed of the call.
    """
    monkeypatch.setattr(DiagonalGaussianDistribution, "sample", lambda self, generator=None: self.mode())
