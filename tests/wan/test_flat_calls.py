"""Host memory grows neither with the number of calls of a pipeline nor with the windows of its videos."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest

PROGRAM = """
import json, os, sys
from pathlib import Path
os.environ |= {"DIFFSYNTH_MODEL_BASE_PATH": sys.argv[1], "DIFFSYNTH_SKIP_DOWNLOAD": "true"}
import torch
import diffsynth
from diffsynth.runtime.progress import no_progress
from diffsynth.testing import tiny_hub
from PIL import Image

torch.set_num_threads(1)
tiny_hub(sys.argv[1], "wan2.1-t2v-1.3b")
pipe = diffsynth.load("wan2.1-t2v-1.3b", device="cpu", torch_dtype=torch.float32)
clip = [Image.linear_gradient("L").resize((64, 64)).convert("RGB").rotate(turn) for turn in range(45)]
call = {"prompt": "a", "height": 64, "width": 64, "num_inference_steps": 1, "cfg_scale": 1.0, "seed": 0,
        "denoising_strength": 0.5, "output_type": "latents", "progress_bar_cmd": no_progress}

def peak():
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM")) * 1024

seen = []
for frames in (13, 13, 45, 45):  # 1 window, and 5
    pipe(**call, num_frames=frames, input_video=clip, sliding_window_size=4, sliding_window_stride=2)
    seen.append(peak())
print(json.dumps(seen))
"""

GIVES_BACK = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "0"}
"""Settings that make glibc return freed memory at once; by default it caches enough to hide a leak."""


@pytest.mark.skipif(sys.platform != "linux", reason="counts pages in /proc")
def test_memory_is_flat_over_calls_and_windows(tmp_path):
    """The peak after two short videos equals that after two videos of five windows, each encoded from a clip.

    Runs in its own process, which spends half of its time loading torch and writing the tiny hub.
    """
    command = [sys.executable, "-c", PROGRAM, str(tmp_path)]
    result = subprocess.run(command, capture_output=True, text=True, check=False, env={**os.environ, **GIVES_BACK})
    assert result.returncode == 0, result.stderr
    peaks = json.loads(result.stdout.splitlines()[-1])
    assert peaks[-1] - peaks[1] < 4e6, [round(peak / 1e6, 1) for peak in peaks]
