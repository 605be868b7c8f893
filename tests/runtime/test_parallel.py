"""Any pipeline distributes the branches of guidance over two processes; one that cannot shard tokens refuses it."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from diffsynth.errors import Unavailable
from processes import run_together
from toy_pipeline import toy_pipeline

CALL = {"prompt": "x" * 6, "negative_prompt": "xx", "cfg_scale": 2.0, "output_type": "latents"}


def share_branches(rank: int) -> dict[str, Any]:
    pipe = toy_pipeline()
    alone = pipe(**CALL, seed=4)
    passes, shown = [], []
    pipe.dit.register_forward_hook(lambda *_: passes.append(1))
    with pytest.raises(ValueError, match="ToyPipeline cannot share the tokens of a result among 2 processes"):
        pipe.parallel()
    assert pipe.mesh.world.size == 1
    assert pipe.parallel(cfg=2) is pipe
    shared = pipe(**CALL, seed=4, progress_bar_cmd=lambda steps: shown.append(1) or steps)
    torch.manual_seed(rank)
    return {
        "equal": torch.equal(shared, alone),
        "passes": len(passes),
        "shows": bool(shown),
        "unseeded": pipe(**CALL, num_inference_steps=1).tolist(),
    }


def test_branches_are_shared() -> None:
    """Each process does one pass a step; the first alone shows progress; without a seed all generate the same."""
    first, second = run_together(2, share_branches)
    for answer in (first, second):
        assert answer["equal"]
        assert answer["passes"] == 4
    assert (first["shows"], second["shows"]) == (True, False)
    assert first["unseeded"] == second["unseeded"]


def test_without_other_processes_nothing_is_shared() -> None:
    with pytest.raises(Unavailable, match="there is no process group; start the script with `torchrun"):
        toy_pipeline().parallel(cfg=2)
