"""Tests of the page on predictions: its blocks run, and its table has the names of the code."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

from diffsynth.sampling.prediction import PREDICTIONS

PAGE = (Path(__file__).parents[2] / "docs" / "predictions.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"^```python\n(.*?)^```", PAGE, flags=re.MULTILINE | re.DOTALL)
ROWS = re.findall(r"^\| `(\w+)` \| .+ \| `(x\w*)` \| (.*)\|$", PAGE, flags=re.MULTILINE)


@pytest.mark.parametrize("block", BLOCKS)
def test_every_block_runs(block):
    names = {"__name__": "block"}
    exec(block, names)
    assert names["x0"].shape == (2, 4, 64, 64)
    assert names["x0"].isfinite().all()
    assert f"from {names['sigmas'][0]:.3f} down to 0" in block


def test_the_table_lists_the_predictions():
    assert [name for name, *_ in ROWS] == list(PREDICTIONS)
    latents, ends = torch.randn(2, 4, 3, 3), torch.tensor([0.0, 1.0])
    for name, scaling, singular in ROWS:
        prediction = PREDICTIONS[name]
        assert (scaling == "x") is (prediction.scale_input(latents, ends) is latents)
        finite = prediction.to_velocity(latents, ends, torch.randn(2, 4, 3, 3)).flatten(1).isfinite().all(dim=1)
        assert ", ".join(f"sigma = {end}" for end in range(2) if not finite[end]) == singular.strip()
