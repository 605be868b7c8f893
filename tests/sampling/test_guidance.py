from __future__ import annotations

import pytest
import torch

from diffsynth.sampling.guidance import classifier_free_guidance

COND, UNCOND = torch.tensor([[3.0, -1.0]]), torch.tensor([[1.0, 1.0]])


@pytest.mark.parametrize(
    ("cfg_scale", "expected"), [(0.0, [[1.0, 1.0]]), (1.0, [[3.0, -1.0]]), (4.0, [[9.0, -7.0]]), (-1.0, [[-1.0, 3.0]])]
)
def test_it_extrapolates_from_uncond_through_cond(cfg_scale, expected):
    assert classifier_free_guidance(COND, UNCOND, cfg_scale).tolist() == expected


def test_it_keeps_the_dtype():
    assert classifier_free_guidance(COND.bfloat16(), UNCOND.bfloat16(), 4.0).dtype == torch.bfloat16


def test_shapes_that_would_broadcast_are_refused():
    with pytest.raises(ValueError, match=r"velocity_cond is \(1, 2\), velocity_uncond is \(2, 2\)"):
        classifier_free_guidance(COND, UNCOND.expand(2, 2), 4.0)
