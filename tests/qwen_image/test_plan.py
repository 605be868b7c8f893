"""Plans of Qwen-Image from its published layouts, without weights."""

from __future__ import annotations

import json

import pytest
from click.testing import CliRunner

from diffsynth.cli.group import program

GIB = 2**30


@pytest.mark.parametrize("limit", [8, 24])
def test_the_published_model_is_planned(limit, monkeypatch, tmp_path) -> None:
    monkeypatch.setenv("DIFFSYNTH_MODEL_BASE_PATH", str(tmp_path))
    result = CliRunner().invoke(program, ["plan", "qwen-image", "--vram", str(limit), "--json"])
    assert result.exit_code == 0, result.output
    plan = json.loads(result.stdout)
    assert plan["fits"]
    assert 0.9 * limit * GIB < plan["peak_vram"] <= limit * GIB
    # 20.4 billion parameters in bf16, and 8.3 of the text encoder in the file.
    assert 50 * GIB < plan["peak_ram"] < 56 * GIB
    assert [stage["name"] for stage in plan["stages"]] == ["encode_prompt", "denoise", "decode_image"]
