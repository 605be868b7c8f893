"""docs/devices.md says what the table of backends says."""

import pytest
import torch

from diffsynth.core import device as devices
from diffsynth.core.device.backends import BACKENDS, Backend
from source_tree import ROOT

PAGE = (ROOT / "docs" / "devices.md").read_text(encoding="utf-8")


def test_the_row_of_every_backend():
    rows = [line for line in PAGE.splitlines() if line.startswith(tuple(f"| `{kind}` |" for kind in BACKENDS))]
    assert rows == [row(backend) for backend in BACKENDS.values()]


def row(backend: Backend) -> str:
    flags = ["yes" if flag else "" for flag in (backend.indexed, backend.streams, backend.pins, backend.counts)]
    names = (str(dtype).removeprefix("torch.") for dtype in backend.lacks)
    lacks = ", ".join(sorted({"float8" if name.startswith("float8") else name for name in names}))
    cells = [f"`{backend.kind}`", backend.label, *flags, lacks, backend.collectives]
    return "|" + "|".join(f" {cell} " if cell else " " for cell in cells) + "|"


def test_the_names_it_speaks_of_exist():
    for name in ("side_stream", "mark", "wait_for", "pinned_memory", "card_name", "compute_capability", "check_device"):
        assert f"{name}(" in PAGE or f"`{name}`" in PAGE
        assert name in devices.__all__


def test_the_refusal_it_shows():
    with pytest.raises(ValueError, match="float8_e4m3fn on MPS") as caught:
        devices.check_dtype(torch.float8_e4m3fn, "mps")
    assert f"ValueError: {caught.value}" in PAGE
