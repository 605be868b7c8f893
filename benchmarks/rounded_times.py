"""Effect of rounding the time that a network reads to bfloat16, as DiffSynth-Studio does with the timestep, 1000 sigma.

    python benchmarks/rounded_times.py [--models NAME ...] [--steps 20] [--seeds 4] [--json FILE]

Each model is called in four ways: in float32 and in bfloat16, each with the times as they are, which are float32 in
this library, and rounded to bfloat16 (937.5 becomes 936). The table has `|a - b| / |b|` of the resulting latents,
medians over seeds; `b` is the call in float32 with exact times, or for "apart" that in bfloat16 with exact times. The
networks are tiny and random, as `diffsynth.testing.tiny_hub` writes them, but for z-image-nano, which is trained.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import diffsynth
from diffsynth.testing import tiny_hub

NANO = "z-image-nano"
MODELS = (NANO, "z-image-turbo", "flux.1-dev", "flux.2-klein-4b", "qwen-image", "wan2.1-t2v-1.3b")
TIMESTEPS = 1000
COLUMNS = ("float32 rounded", "bfloat16", "bfloat16 rounded", "apart")


def round_time(module: torch.nn.Module, arguments: tuple[Any, ...], keywords: dict[str, Any]) -> Any:
    """Forward hook of a network: its second argument is sigma, or 1 - sigma in Z-Image's."""
    latents, time, *others = arguments
    runs_backwards = "ZImage" in type(module).__name__
    sigma = 1 - time if runs_backwards else time
    rounded = (sigma * TIMESTEPS).bfloat16().float() / TIMESTEPS
    return (latents, 1 - rounded if runs_backwards else rounded, *others), keywords


def latents_of(name: str, dtype: torch.dtype, *, rounded: bool, steps: int, seeds: int) -> list[Tensor]:
    """Return the latents of a call for each seed, fp64."""
    pipe = diffsynth.load(name, device="cpu", torch_dtype=dtype)
    hook = pipe.dit.register_forward_pre_hook(round_time, with_kwargs=True) if rounded else None
    call: dict[str, Any] = {"num_inference_steps": steps, "output_type": "latents"}
    if name != NANO:
        call |= {"height": 64, "width": 64} | ({"num_frames": 5} if name.startswith("wan") else {})
    made = [pipe("a red apple", seed=seed, **call).double() for seed in range(seeds)]
    if hook is not None:
        hook.remove()
    return made


def distance(found: Sequence[Tensor], expected: Sequence[Tensor]) -> float:
    """Return the median over seeds of `|a - b| / |b|`."""
    return statistics.median(float((a - b).norm() / b.norm()) for a, b in zip(found, expected, strict=True))


def compare(name: str, *, steps: int, seeds: int) -> dict[str, float]:
    """Return a dict column -> distance."""
    runs = {
        (dtype, rounded): latents_of(name, dtype, rounded=rounded, steps=steps, seeds=seeds)
        for dtype in (torch.float32, torch.bfloat16)
        for rounded in (False, True)
    }
    exact, ours = runs[torch.float32, False], runs[torch.bfloat16, False]
    pairs = (
        (runs[torch.float32, True], exact),
        (ours, exact),
        (runs[torch.bfloat16, True], exact),
        (runs[torch.bfloat16, True], ours),
    )
    return {column: distance(*pair) for column, pair in zip(COLUMNS, pairs, strict=True)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", choices=MODELS, default=MODELS)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--seeds", type=int, default=4)
    parser.add_argument("--json", type=Path, help="also write the figures here")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        if tiny := [name for name in options.models if name != NANO]:
            tiny_hub(folder, tiny)
        os.environ |= {"DIFFSYNTH_MODEL_BASE_PATH": folder, "DIFFSYNTH_SKIP_DOWNLOAD": "true"}
        print(f"{'distance in %':18}" + "".join(f"{column:>18}" for column in COLUMNS))
        figures = {}
        for name in options.models:
            figures[name] = compare(name, steps=options.steps, seeds=options.seeds)
            print(f"{name:18}" + "".join(f"{100 * value:18.2f}" for value in figures[name].values()), flush=True)
    if options.json:
        report = {"torch": torch.__version__, "steps": options.steps, "seeds": options.seeds, "models": figures}
        options.json.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
