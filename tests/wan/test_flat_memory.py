"""Host memory grows neither with the windows of a video nor with the number of clips."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest

PROGRAM = """
import json
from collections.abc import Sequence
from pathlib import Path
import torch
from PIL import Image
from diffsynth_wan.units.shape import VideoShape
from diffsynth.sampling.windows import SlidingWindow, blend_windows

torch.set_num_threads(1)
torch.set_grad_enabled(False)

def peak():
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM")) * 1024

class Clip(Sequence):
    def __len__(self):
        return 129
    def __getitem__(self, index):
        return Image.new("RGB", (256, 256), (index, 0, 0))

class Shrinks:
    def encode_pieces(self, pieces, **tiling):
        return (piece[:, :, :1, ::8, ::8] * 1 for piece in pieces)

def windows(stride):
    latents = torch.zeros(1, 16, 41, 64, 64)
    blend_windows(lambda latents, window: latents + 1, SlidingWindow(4, stride).windows(41), latents)

def clip(frames):
    shape = VideoShape(num_frames=frames, height=256, width=256, vae_factor=8, time_factor=4,
                    resize_mode="stretch", tiling={}, device=torch.device("cpu"), dtype=torch.float32)
    shape.encode_clip(Shrinks(), "input_video", Clip())

seen = {"windows": [], "clips": []}
for stride in (4, 4, 1):  # 11 windows, and 38
    windows(stride)
    seen["windows"].append(peak())
for frames in (9, 9, 129, 129):
    clip(frames)
    seen["clips"].append(peak())
print(json.dumps(seen))
"""

GIVES_BACK = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "0"}
"""Settings that make glibc return freed memory at once; by default it caches enough to hide a leak."""


@pytest.mark.skipif(sys.platform != "linux", reason="counts pages in /proc")
def test_memory_is_flat_over_windows_and_clips():
    """The peak with few windows and a short clip equals that with many windows and a long clip.

    A window and its velocity are 1 MB each, a piece of a clip 3 MB. Most of the time is spent loading torch.
    """
    environment = {**os.environ, **GIVES_BACK}
    command = [sys.executable, "-c", PROGRAM]
    result = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    assert result.returncode == 0, result.stderr
    for name, peaks in json.loads(result.stdout.splitlines()[-1]).items():
        assert peaks[-1] < 1.01 * peaks[1], f"{name}: {[round(peak / 1e6, 1) for peak in peaks]} MB"
