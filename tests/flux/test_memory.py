"""Memory plans of FLUX, and policies and limits that change no bit of its images."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner

import diffsynth
from diffsynth.cli.group import program
from diffsynth.core.planning import Speeds
from diffsynth.core.vram.managed import managed
from diffsynth.runtime import planning
from diffsynth.runtime.progress import no_progress
from diffsynth.testing import tiny_hub
from limited import device_bytes, keep_limit, let_blocks_travel

GIB = 2**30
DOCS = Path(__file__).parents[2] / "docs" / "models"
MODELS = ("flux.1-dev", "flux.2-klein-4b")
CALL = {"num_inference_steps": 1, "height": 64, "width": 48, "cfg_scale": 2.0, "seed": 3, "output_type": "tensor"}
CALL |= {"progress_bar_cmd": no_progress}


@pytest.mark.parametrize(("model", "limit", "page"), [("flux.1-dev", 8, "flux-1"), ("flux.2-dev", 10, "flux-2")])
def test_the_plan_of_the_manual_keeps_its_limit(model, limit, page, monkeypatch, tmp_path):
    """The speeds are those that are assumed of a device which is not here."""
    monkeypatch.setenv("DIFFSYNTH_MODEL_BASE_PATH", str(tmp_path))
    monkeypatch.setattr(planning, "_speeds", lambda device, dtype: Speeds(25e9, 99e12, 3e9))
    result = CliRunner().invoke(program, ["plan", model, "--vram", str(limit), "--json"])
    assert result.exit_code == 0, result.output
    plan = json.loads(result.stdout)
    assert plan["fits"]
    assert plan["peak_vram"] <= limit * GIB
    text = (DOCS / f"{page}.md").read_text(encoding="utf-8")
    block = re.search(rf"^\$ diffsynth plan {re.escape(model)} --vram {limit}\n(.*?)^```", text, re.M | re.S)[1]
    rows = {line.split()[0]: line for line in block.splitlines() if line}
    for stage in plan["stages"]:
        assert f" {stage['vram'] / GIB:.2f} " in rows[stage["name"]]
        for part in stage["components"]:
            stay, travel = len(part["resident"]), len(part["streamed"])
            share = f"{stay} of {stay + travel} blocks resident" if travel else "whole"
            assert f"{part['role']}: {share}" in rows[stage["name"]]
    assert f"{plan['peak_vram'] / GIB:.2f} GiB VRAM" in rows["peak"]
    assert f"--vram {-(-plan['smallest_vram'] * 100 // GIB) / 100:.2f}" in rows["smallest"]


@pytest.fixture(scope="module")
def hub(tmp_path_factory):
    root = tmp_path_factory.mktemp("hub")
    tiny_hub(root, MODELS)
    return root


@pytest.fixture
def load(hub, monkeypatch):
    monkeypatch.setenv("DIFFSYNTH_MODEL_BASE_PATH", str(hub))
    monkeypatch.setenv("DIFFSYNTH_SKIP_DOWNLOAD", "true")
    let_blocks_travel(monkeypatch)
    return lambda model, **options: diffsynth.load(model, device="cpu", torch_dtype=torch.float32, **options)


@pytest.mark.parametrize("model", MODELS)
def test_policies_and_limits_change_no_bit(model, load, monkeypatch):
    expected = load(model)("a red apple", **CALL)
    for policy in ("none", "cpu-offload", "dynamic", {"dit": "disk"}):
        assert torch.equal(load(model, policy=policy)("a red apple", **CALL), expected), policy
    pipe = load(model, policy="disk")
    assert torch.equal(pipe("a red apple", **CALL), expected)
    keep_limit(pipe, 8)
    free = pipe.plan_cache.plan(pipe.check(**CALL), CALL)
    limit = free.smallest_vram + 0.3 * (free.peak_vram - free.smallest_vram)
    plans = keep_limit(pipe, limit / GIB)
    with device_bytes(monkeypatch) as most:
        assert torch.equal(pipe("a red apple", **CALL), expected)
    (plan,) = plans
    assert plan.peak_vram <= limit
    for role, part in ((role, managed(pipe.parts[role])) for role in ("dit", "vae")):
        lines = [line for line in plan.stages if role in line.roles]
        assert 0 < most[part] <= max(line.vram - line.activations for line in lines)
