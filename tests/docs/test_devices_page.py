"""docs/devices.md agrees with the table of backends."""

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
    flags = [
        "yes" if flag else ""
        for flag in (backend.indexed, backend.streams, backend.pinned_memory, backend.memory_stats)
    ]
    names = (str(dtype).removeprefix("torch.") for dtype in backend.unsupported_dtypes)
    unsupported = ", ".join(sorted({"float8" if name.startswith("float8") else name for name in names}))
    cells = [f"`{backend.kind}`", backend.label, *flags, unsupported, backend.collectives]
    return "|" + "|".join(f" {cell} " if cell else " " for cell in cells) + "|"


def test_the_names_on_the_page_exist():
    for name in (
        "side_stream",
        "record_event",
        "wait_event",
        "pinned_memory",
        "card_name",
        "compute_capability",
        "check_device",
    ):
        assert f"{name}(" in PAGE or f"`{name}`" in PAGE
        assert name in devices.__all__


def test_the_refusal_on_the_page():
    with pytest.raises(ValueError, match="float8_e4m3fn on MPS") as caught:
        devices.check_dtype(torch.float8_e4m3fn, "mps")
    assert f"ValueError: {caught.value}" in PAGE
