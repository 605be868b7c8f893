"""Devices that the backends of libraries support, by compute capability."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from diffsynth.core.attention.libraries.flash_attention import FLASH_ATTENTION_2, FLASH_ATTENTION_3, FLASH_ATTENTION_4
from diffsynth.core.attention.libraries.probing import device_refusal


@pytest.mark.parametrize(
    ("backend", "serves"),
    [
        (FLASH_ATTENTION_2, {(8, 0), (8, 9), (9, 0), (10, 0), (12, 0)}),
        (FLASH_ATTENTION_3, {(9, 0)}),
        (FLASH_ATTENTION_4, {(9, 0), (10, 0)}),
    ],
)
def test_generations(backend, serves, monkeypatch: pytest.MonkeyPatch) -> None:
    call = SimpleNamespace(q=SimpleNamespace(device=torch.device("cuda")))
    monkeypatch.setattr(torch.version, "hip", None)
    for capability in [(7, 5), (8, 0), (8, 9), (9, 0), (10, 0), (12, 0)]:
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _, found=capability: found)
        reason = device_refusal(backend.name, call, backend.capabilities)
        assert (reason is None) == (capability in serves), reason
        assert reason is None or f"sm_{capability[0]}{capability[1]}" in reason
    monkeypatch.setattr(torch.version, "hip", "7.0")
    assert device_refusal(backend.name, call, backend.capabilities) == "it has no kernels for ROCm"
    assert (device_refusal(backend.name, call, backend.capabilities, rocm=backend.rocm) is None) == backend.rocm
