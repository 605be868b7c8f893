"""Guidance that keeps the norm of each token."""

from __future__ import annotations

import torch

from diffsynth.runtime.guidance import parse_guidance
from diffsynth.sampling.guidance import classifier_free_guidance
from diffsynth_qwen_image.guidance import TokenNorm, token_norm_guidance


def test_each_token_keeps_its_norm_and_has_the_direction_of_guidance() -> None:
    cond, uncond = torch.randn(2, 2, 4, 3, 6, 8, generator=torch.Generator().manual_seed(0))
    guided = token_norm_guidance(cond, uncond, 4.0)
    plain = classifier_free_guidance(cond, uncond, 4.0)

    def tokens(velocity):
        return velocity.unfold(3, 2, 2).unfold(4, 2, 2).permute(0, 2, 3, 4, 1, 5, 6).flatten(4)

    torch.testing.assert_close(tokens(guided).norm(dim=-1), tokens(cond).norm(dim=-1))
    cosines = torch.cosine_similarity(tokens(guided), tokens(plain), dim=-1)
    torch.testing.assert_close(cosines, torch.ones_like(cosines))
    assert not token_norm_guidance(torch.zeros(1, 1, 2, 2), torch.zeros(1, 1, 2, 2), 4.0).any()


def test_it_is_declared() -> None:
    assert parse_guidance("token_norm") == TokenNorm()
