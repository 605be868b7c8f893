"""The page on video memory: its presets are the code's, its program runs."""

from __future__ import annotations

import re
from pathlib import Path

import torch

from diffsynth.core.loader.config import VRAM_KEYS
from diffsynth.core.vram.policy import PRESETS, BlockState, Placement, Policy

PAGE = (Path(__file__).parents[2] / "docs" / "vram.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"^```python\n(.*?)^```", PAGE, flags=re.MULTILINE | re.DOTALL)


def section(title):
    return PAGE.partition(f"## {title}\n")[2].partition("\n## ")[0]


def cell(placement: Placement, device: str) -> str:
    if placement.on_disk:
        return "disk"
    where = "device" if placement.device == device else "host"
    return where if placement.dtype is None else f"fp8@{where}"


def test_presets(monkeypatch):
    from diffsynth.core import device as devices

    monkeypatch.setattr(devices, "check_device", lambda name: torch.device(name))
    monkeypatch.setattr(devices, "check_dtype", lambda dtype, device: None)
    rows = re.findall(r"^\| `([\w-]+)` \| (.+?) \| (.+?) \| (.+?) \| (.+?) \|", section("Presets"), flags=re.MULTILINE)
    assert {row[0] for row in rows} == set(PRESETS)
    for name, *cells in rows:
        policy = Policy.preset(name, "cuda:0")
        assert cells == [cell(getattr(policy, state.value), "cuda:0") for state in BlockState], name


def test_the_eight_keys():
    named = re.findall(r"`(\w+_(?:device|dtype))`", section("Eight keys"))
    assert sorted(name for name in named if name != "torch_dtype") == sorted(VRAM_KEYS)


def test_the_program_runs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (block,) = [block for block in BLOCKS if "class Tower" in block]
    exec(block, {"__name__": "block"})
