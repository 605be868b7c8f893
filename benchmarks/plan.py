"""Errors of plans on the CPU: predicted peaks of memory against VmHWM of fresh processes.

    python benchmarks/plan.py [--cases CASE ...] [--json FILE]
    python benchmarks/plan.py --times [--json FILE]

Each case is a Z-Image pipeline of random fp32 weights, shaped so that one stage takes most. One process plans it on
the meta device, without weights; another one builds and calls it, and reports the peak that the system counted (VmHWM
in /proc). Both count the whole process: interpreter, libraries, weights, activations, workspaces of kernels. Goal:
within 10 %.

`--times` measures `diffsynth plan` itself: CPU seconds of fresh processes, imports included; other work on the machine
changes them less than it changes the clock. Goal: 20 for 14B at 720p.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import platform
import resource
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from diffsynth.core.planning.workload import GIB

SMALL_DIT = {"dim": 256, "n_layers": 1, "n_refiner_layers": 1, "n_heads": 2, "n_kv_heads": 2, "cap_feat_dim": 64}
SMALL_TEXT = {"hidden_size": 64, "num_heads": 2, "num_kv_heads": 1, "head_dim": 128, "vocab_size": 320}
SMALL_VAE = {"block_out_channels": (32, 32, 32, 32), "layers_per_block": 1}
CASES: dict[str, dict[str, Any]] = {
    "denoise, one image": {
        "dit": SMALL_DIT | {"dim": 1536, "n_heads": 12, "n_kv_heads": 12, "n_layers": 4},
        "call": {"height": 1536, "width": 1024, "output_type": "latents", "num_inference_steps": 2},
        "stage": "denoise",
    },
    "denoise, many images": {
        "dit": SMALL_DIT | {"dim": 512, "n_heads": 4, "n_kv_heads": 4},
        "call": {"height": 256, "width": 256, "num_images": 128, "output_type": "latents", "num_inference_steps": 1},
        "stage": "denoise",
    },
    "decode, published autoencoder": {
        "vae": {"block_out_channels": (128, 256, 512, 512), "layers_per_block": 2},
        "call": {"height": 768, "width": 768, "output_type": "tensor", "num_inference_steps": 1},
        "stage": "decode_image",
    },
    "decode, narrow autoencoder": {
        "call": {"height": 1536, "width": 1536, "output_type": "tensor", "num_inference_steps": 1},
        "stage": "decode_image",
    },
    "encode_prompt": {
        "text_encoder": {"hidden_size": 1024, "num_heads": 8, "num_kv_heads": 4, "intermediate_size": 3072},
        "dit": SMALL_DIT | {"cap_feat_dim": 1024},
        "call": {"height": 64, "width": 64, "output_type": "latents", "num_inference_steps": 1},
        "prompts": 96,
        "stage": "encode_prompt",
    },
}

COMMANDS = {
    "Wan2.1-T2V-14B, 1280x720, 81 frames": "wan2.1-t2v-14b --height 720 --width 1280 --frames 81 --vram 24",
    "Wan2.1-T2V-1.3B, 832x480, 81 frames": "wan2.1-t2v-1.3b --height 480 --width 832 --frames 81 --vram 8",
    "Z-Image 6B, 2048x2048": "z-image-turbo --height 2048 --width 2048 --vram 12",
    "Z-Image 6B, 1024x1024": "z-image-turbo --height 1024 --width 1024 --vram 12",
}


def pipeline(case: dict[str, Any], device: str) -> Any:
    """Return the pipeline of a case, with random weights or, on meta, without any."""
    import torch

    from diffsynth.models.config import TINY_QWEN3_TEXT_ENCODER, FluxAutoencoderConfig
    from diffsynth.models.flux_autoencoder import FluxAutoencoder
    from diffsynth.models.qwen3 import Qwen3TextEncoder
    from diffsynth.runtime.meta_components import FixedLengthTokenizer
    from diffsynth_zimage import ZImagePipeline
    from diffsynth_zimage.config import ZImageDiTConfig
    from diffsynth_zimage.dit import ZImageDiT

    text = dataclasses.replace(TINY_QWEN3_TEXT_ENCODER, **(SMALL_TEXT | case.get("text_encoder", {})))
    configs = {
        "dit": (ZImageDiT, ZImageDiTConfig(**(case.get("dit", SMALL_DIT)))),
        "text_encoder": (Qwen3TextEncoder, text),
        "vae": (FluxAutoencoder, FluxAutoencoderConfig(**(case.get("vae", SMALL_VAE)))),
    }
    parts = {}
    with torch.device("meta"):
        for role, (module, config) in configs.items():
            parts[role] = module(config).float().eval().requires_grad_(False)
    if device != "meta":
        for part in parts.values():
            part.to_empty(device=device)
            for tensor in part.parameters():
                tensor.normal_(std=0.02)
    return ZImagePipeline(parts | {"tokenizer": FixedLengthTokenizer(512)}, device=device, torch_dtype=torch.float32)


def call(case: dict[str, Any]) -> dict[str, Any]:
    prompts = case.get("prompts")
    # Equal texts are encoded once.
    prompt = {} if prompts is None else {"prompt": [f"{number}" for number in range(prompts)]}
    return {**case["call"], **prompt, "seed": 0, "progress_bar_cmd": iter}


def predict(name: str) -> dict[str, Any]:
    """Return the prediction of a plan; runs in a process of its own."""
    from diffsynth.runtime.planning import plan_call

    case = CASES[name]
    pipe = pipeline(case, "meta")
    begun = time.perf_counter()
    plan = plan_call(pipe, call(case), device="cpu")
    stages = {stage.name: stage for stage in plan.stages}
    return {
        "predicted": plan.peak_ram,
        "activations": stages[case["stage"]].activations,
        "stages": {name: stage.ram for name, stage in stages.items()},
        "seconds_to_plan": time.perf_counter() - begun,
    }


def measure(name: str) -> dict[str, Any]:
    """Return the measured peak of a call; runs in a process of its own."""
    from diffsynth.core.device.memory import memory_in_use, peak_memory

    case = CASES[name]
    pipe = pipeline(case, "cpu")
    before = memory_in_use("cpu")
    begun = time.perf_counter()
    pipe(**call(case))
    return {"measured": peak_memory("cpu"), "before": before, "seconds": time.perf_counter() - begun}


def fresh(mode: str, name: str) -> dict[str, Any]:
    result = subprocess.run([sys.executable, __file__, mode, name], capture_output=True, text=True, check=False)
    if result.returncode:
        raise SystemExit(f"{mode} {name!r} failed:\n{result.stderr}")
    answer: dict[str, Any] = json.loads(result.stdout.splitlines()[-1])
    return answer


def times() -> dict[str, float]:
    """Return the CPU seconds of each of `COMMANDS`, in user and system mode."""
    seconds = {}
    for name, command in COMMANDS.items():
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        program = Path(sys.executable).with_name("diffsynth")
        subprocess.run([program, "plan", *command.split(), "--json"], stdout=subprocess.DEVNULL, check=True)
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        seconds[name] = after.ru_utime - before.ru_utime + after.ru_stime - before.ru_stime
        print(f"{name:38} {seconds[name]:6.1f} CPU s", flush=True)
    return seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", nargs="+", choices=CASES, default=list(CASES))
    parser.add_argument("--times", action="store_true", help="measure only the time of plans")
    parser.add_argument("--json", type=Path, help="also write the figures here")
    parser.add_argument("--predict", choices=CASES, help=argparse.SUPPRESS)
    parser.add_argument("--measure", choices=CASES, help=argparse.SUPPRESS)
    options = parser.parse_args()
    for one, function in ((options.predict, predict), (options.measure, measure)):
        if one:
            print(json.dumps(function(one)))
            return
    results = {"cpu_seconds": times()} if options.times else {"cases": accuracy(options.cases)}
    if options.json:
        import torch

        machine = {"cores": os.cpu_count(), "machine": platform.machine(), "torch": torch.__version__}
        options.json.parent.mkdir(parents=True, exist_ok=True)
        options.json.write_text(json.dumps({"machine": machine, **results}, indent=2) + "\n")


def accuracy(cases: list[str]) -> dict[str, dict[str, Any]]:
    """Return the predicted and the measured peaks of memory by case."""
    rows = {}
    print(f"{'case':32} {'predicted':>10} {'measured':>10} {'error':>7} {'activations':>12} {'plan s':>7} {'run s':>7}")
    for name in cases:
        row = rows[name] = fresh("--predict", name) | fresh("--measure", name)
        row["error"] = row["predicted"] / row["measured"] - 1
        gib = [f"{row[key] / GIB:.2f}" for key in ("predicted", "measured", "activations")]
        print(
            f"{name:32} {gib[0]:>10} {gib[1]:>10} {row['error']:>+7.1%} {gib[2]:>12} "
            f"{row['seconds_to_plan']:>7.1f} {row['seconds']:>7.1f}"
        )
    return rows


if __name__ == "__main__":
    main()
