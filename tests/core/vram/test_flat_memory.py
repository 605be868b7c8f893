"""Streaming from disk takes no more memory at the fiftieth step than at the third: in a process of its own."""

from __future__ import annotations

import subprocess
import sys

import pytest

PROGRAM = """
import json, struct, sys
from pathlib import Path
import torch
from torch import nn
from diffsynth.core.vram import DiskMap, Policy, wrap

class Tower(nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(WIDTH, WIDTH, bias=False) for _ in range(LAYERS))

    def forward(self, x):
        for layer in self.layers:
            x = x + layer(x)
        return x

WIDTH, LAYERS, STEPS = 2048, 18, 50
size = WIDTH * WIDTH * 4
header = {
    f"layers.{i}.weight": {"dtype": "F32", "shape": [WIDTH, WIDTH], "data_offsets": [i * size, (i + 1) * size]}
    for i in range(LAYERS)
}
text = json.dumps(header).encode()
file = Path(sys.argv[1]) / "tower.safetensors"
with file.open("wb") as stream:
    stream.write(struct.pack("<Q", len(text)) + text)
    stream.truncate(8 + len(text) + LAYERS * size)  # a hole: zeros that take no disk

def resident_bytes():
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096

with torch.device("meta"):
    tower = Tower().requires_grad_(False)
managed = wrap(tower, Policy.preset("disk", "cpu"), source=DiskMap(file).source_of(tower))
managed.configure(resident=(), slots=2)
seen = []
with torch.no_grad(), managed:
    x = torch.randn(1, WIDTH)
    for _ in range(STEPS):
        assert torch.equal(tower(x), x)
        seen.append(resident_bytes())
print(json.dumps({"total": LAYERS * size, "moved": managed.report.bytes_moved, "seen": seen}))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="counts pages in /proc")
def test_memory_is_flat_over_steps(tmp_path):
    import json

    command = [sys.executable, "-c", PROGRAM, str(tmp_path)]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    found = json.loads(result.stdout)
    third, last = found["seen"][2], found["seen"][-1]
    assert found["total"] > 300e6
    assert found["moved"] >= 50 * found["total"]
    assert last < 1.01 * third, f"{third / 1e6:.1f} MB after step 3, {last / 1e6:.1f} MB after step 50"
    assert max(found["seen"]) < 1.01 * third
