"""Defaults of calls in the metadata of LoRA files."""

from __future__ import annotations

import pytest
import torch

from diffsynth.core.lora import read_lora, save_lora
from diffsynth.core.lora.call_defaults import KEY, call_defaults_metadata, read_call_defaults
from diffsynth.errors import KeyMismatch

LORA = {"to_q.lora_A.weight": torch.ones(2, 4), "to_q.lora_B.weight": torch.ones(3, 2)}
DEFAULTS = {"num_inference_steps": 4, "cfg_scale": 1.0, "sigmas": [1.0, 0.5], "lightning_schedule": True}


def test_they_are_written_read_and_kept(tmp_path) -> None:
    saved = save_lora(LORA, tmp_path / "fast.safetensors", call_defaults=DEFAULTS)
    read = read_lora(saved)
    assert read.call_defaults == DEFAULTS
    assert read_lora(save_lora(read, tmp_path / "again.safetensors")).call_defaults == DEFAULTS
    assert read_lora(save_lora(read, tmp_path / "none.safetensors", call_defaults={})).call_defaults == {}
    assert read_lora(LORA).call_defaults == {}


@pytest.mark.parametrize("text", ["", "4", "[1]", "{"])
def test_metadata_that_is_no_object_is_refused(text) -> None:
    with pytest.raises(KeyMismatch, match="expected a JSON object of call arguments"):
        read_call_defaults({KEY: text}, "fast.safetensors")


def test_values_that_json_does_not_have_are_refused() -> None:
    with pytest.raises(ValueError, match="expected numbers, texts and lists"):
        call_defaults_metadata({"sigmas": torch.ones(2)})
    assert call_defaults_metadata({}) == {}
