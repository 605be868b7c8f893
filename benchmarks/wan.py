"""Compare Wan with diffusers: seconds per step and memory of networks, frames per second and memory of autoencoders.

    python benchmarks/wan.py                           on a GPU: published sizes, random weights, bf16
    python benchmarks/wan.py --cases t2v-1.3b decode   some cases
    python benchmarks/wan.py --tiny                    tiny sizes in fp32 on the CPU, to check that it runs

Each library runs in its own process, with the same sizes. A step is two forward passes, one with the prompt and one
without, as in guidance. Times are medians. The autoencoders work without tiles; ours gets the video in pieces and moves
each result to the CPU, as the pipeline does.

* memory: peak of torch's allocator on a GPU, weights included; on the CPU, peak of the process.
* published: figures that others measured for the same case, with their hardware; see PUBLISHED.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import reporting
import torch
from torch import Tensor, nn

from diffsynth.core import device as devices

RESULTS = Path(__file__).parent / "results"
LIBRARIES = ("diffsynth", "diffusers")
GIB = 2**30

PUBLISHED = {
    "i2v-14b": {
        "hardware": "one H100, 40 steps, measured by LightX2V, 2025-12-01",
        "seconds": {"diffusers": 9.77, "xDiT": 8.93, "FastVideo": 7.35, "SGL-Diffusion": 6.13, "LightX2V": 5.18},
    }
}
"""Seconds per step of Wan2.1-I2V-14B-480P, 81 frames; not measured by us."""


@dataclass(frozen=True)
class Case:
    """A network, or a direction of the autoencoder, and the size of the video.

    Args:
        frames, height, width: size of the video; height and width in pixels.
        sizes: config fields of the network; None for the autoencoder.
        coder: "encode" or "decode", for the autoencoder.
    """

    frames: int
    height: int
    width: int
    sizes: dict[str, int] | None = None
    coder: str = ""

    @property
    def latent(self) -> tuple[int, int, int]:
        """Frames, height and width of the latents."""
        return (self.frames - 1) // 4 + 1, self.height // 8, self.width // 8


T2V = {"dim": 1536, "ffn_dim": 8960, "num_heads": 12, "num_layers": 30, "text_dim": 4096, "in_channels": 16}
I2V = {"dim": 5120, "ffn_dim": 13824, "num_heads": 40, "num_layers": 40, "text_dim": 4096, "in_channels": 36}
SMALL = {"dim": 24, "ffn_dim": 48, "num_heads": 2, "num_layers": 2, "text_dim": 16}

FULL = {
    "t2v-1.3b": Case(81, 480, 832, T2V),
    "i2v-14b": Case(81, 480, 832, I2V | {"image_dim": 1280}),
    "encode": Case(81, 720, 1280, coder="encode"),
    "decode": Case(81, 720, 1280, coder="decode"),
}
TINY = {
    "t2v-1.3b": Case(9, 32, 48, SMALL | {"in_channels": 16}),
    "i2v-14b": Case(9, 32, 48, SMALL | {"in_channels": 36, "image_dim": 8}),
    "encode": Case(9, 32, 48, coder="encode"),
    "decode": Case(9, 32, 48, coder="decode"),
}


def build(case: Case, library: str, device: torch.device, dtype: torch.dtype, *, tiny: bool) -> nn.Module:
    """Return the network or the autoencoder with random weights, without gradients."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with device:
            module = _autoencoder(library, 8 if tiny else 96) if case.sizes is None else _network(case.sizes, library)
    finally:
        torch.set_default_dtype(before)
    generator = torch.Generator(device).manual_seed(0)
    for parameter in module.eval().requires_grad_(False).parameters():
        parameter.normal_(std=0.02, generator=generator)
    return module


def _network(sizes: dict[str, int], library: str) -> nn.Module:
    if library == "diffsynth":
        from diffsynth_wan.config import WanDiTConfig
        from diffsynth_wan.dit import WanDiT

        return WanDiT(WanDiTConfig(**sizes))
    from diffusers import WanTransformer3DModel

    image_dim = sizes.get("image_dim")
    return WanTransformer3DModel(
        num_attention_heads=sizes["num_heads"],
        attention_head_dim=sizes["dim"] // sizes["num_heads"],
        in_channels=sizes["in_channels"],
        out_channels=16,
        text_dim=sizes["text_dim"],
        ffn_dim=sizes["ffn_dim"],
        num_layers=sizes["num_layers"],
        image_dim=image_dim,
        added_kv_proj_dim=sizes["dim"] if image_dim else None,
    )


def _autoencoder(library: str, dim: int) -> nn.Module:
    if library == "diffsynth":
        from diffsynth.models.config import WanAutoencoderConfig
        from diffsynth.models.wan_autoencoder import WanAutoencoder

        return WanAutoencoder(WanAutoencoderConfig(dim=dim))
    from diffusers import AutoencoderKLWan

    return AutoencoderKLWan(base_dim=dim)


def work(case: Case, library: str, module: nn.Module, device: torch.device, dtype: torch.dtype) -> Callable[[], Any]:
    """Return a function that runs one step, or encodes or decodes once."""
    generator = torch.Generator("cpu").manual_seed(1)

    def random(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator).to(device, dtype)

    if case.sizes is not None:
        return _step(case, case.sizes, library, module, random)
    encodes = case.coder == "encode"
    given = random(1, 3, case.frames, case.height, case.width) if encodes else random(1, 16, *case.latent)
    if library == "diffusers":
        return lambda: module.encode(given).latent_dist.mode() if encodes else module.decode(given, return_dict=False)
    sizes = [1, *[4 if encodes else 1] * (case.latent[0] - 1)]

    def ours() -> None:
        for piece in (module.encode_pieces if encodes else module.decode_pieces)(given.split(sizes, dim=2)):
            piece.to("cpu")

    return ours


def _step(
    case: Case, sizes: dict[str, int], library: str, module: nn.Module, random: Callable[..., Tensor]
) -> Callable[[], Any]:
    latents = random(1, 16, *case.latent)
    prompts = [random(1, 512, sizes["text_dim"]) for _ in range(2)]
    extra = sizes["in_channels"] - 16
    condition = random(1, extra, *case.latent) if extra else None
    image = random(1, 257, sizes["image_dim"]) if "image_dim" in sizes else None
    if library == "diffsynth":
        sigma = torch.full((1,), 0.7, device=latents.device)
        return lambda: [module(latents, sigma, prompt, image, condition) for prompt in prompts]
    whole = latents if condition is None else torch.cat([latents, condition], dim=1)
    times = torch.full((1,), 700, device=latents.device)
    return lambda: [module(whole, times, prompt, image, return_dict=False) for prompt in prompts]


def run_one(name: str, library: str, options: argparse.Namespace) -> dict[str, Any]:
    """Measure one library in this process and return its row."""
    device = torch.device(options.device)
    dtype = torch.float32 if device.type == "cpu" else torch.bfloat16
    case = (TINY if options.tiny else FULL)[name]
    with torch.no_grad():
        run = work(case, library, build(case, library, device, dtype, tiny=options.tiny), device, dtype)
        times = []
        for index in range(options.warmup + options.repeats):
            if index == options.warmup:
                devices.reset_peak_memory(device)
            devices.synchronize(device)
            started = time.perf_counter()
            run()
            devices.synchronize(device)
            times.append(time.perf_counter() - started)
    seconds = statistics.median(times[options.warmup :])
    row = {"case": name, "library": library, "seconds": seconds, "memory": devices.peak_memory(device)}
    row |= {"frames": case.frames, "height": case.height, "width": case.width}
    return row | ({"frames_per_second": case.frames / seconds} if case.coder else {})


def in_a_process(name: str, library: str, options: argparse.Namespace) -> dict[str, Any]:
    """Return the row of one library, measured in a new process; if that fails, a row with its exit code."""
    given = ["--one", library, "--cases", name, "--device", options.device]
    given += ["--repeats", str(options.repeats), "--warmup", str(options.warmup)] + ["--tiny"] * options.tiny
    row, failure = reporting.run_alone(__file__, *given)
    return row if failure is None else {"case": name, "library": library, "failed": failure}


def show(rows: list[dict[str, Any]], *, tiny: bool) -> list[str]:
    """Return the lines of the table; published figures follow the rows of their case, except with `--tiny`."""
    lines = [f"{'':12}{'':16}{'seconds':>10}{'frames/s':>10}{'GiB':>8}"]
    for name in dict.fromkeys(row["case"] for row in rows):
        for row in (each for each in rows if each["case"] == name):
            head = f"{name:12}{row['library']:16}"
            if "failed" in row:
                lines.append(f"{head} failed: {row['failed']}")
                continue
            rate = f"{row['frames_per_second']:10.2f}" if "frames_per_second" in row else f"{'-':>10}"
            memory = f"{row['memory'] / GIB:8.2f}" if row["memory"] is not None else f"{'-':>8}"
            lines.append(f"{head}{row['seconds']:10.3f}{rate}{memory}")
        if name in PUBLISHED and not tiny:
            known = PUBLISHED[name]
            lines += [f"{name:12}{who:16}{seconds:10.3f}  published" for who, seconds in known["seconds"].items()]
            lines.append(f"{'':12}published: {known['hardware']}")
    return lines


def machine(options: argparse.Namespace) -> dict[str, Any]:
    """Return the device, versions and options."""
    facts = reporting.machine(options.device, "diffusers", "diffsynth-core", "diffsynth-wan")
    return {**facts, "tiny": options.tiny, "repeats": options.repeats, "published": PUBLISHED}


def arguments(given: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", nargs="+", choices=FULL, default=list(FULL))
    parser.add_argument("--libraries", nargs="+", choices=LIBRARIES, default=list(LIBRARIES))
    parser.add_argument("--tiny", action="store_true", help="tiny sizes, on the CPU unless --device is given")
    parser.add_argument("--device", help="default: the first accelerator; cpu with --tiny")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--warmup", type=int, default=1)
    parser.add_argument("--json", type=Path, help="default: benchmarks/results/wan-<gpu|cpu|tiny>.json")
    parser.add_argument("--one", choices=LIBRARIES, help=argparse.SUPPRESS)
    options = parser.parse_args(given)
    options.device = options.device or ("cpu" if options.tiny else str(devices.default_device()))
    kind = "tiny" if options.tiny else "cpu" if torch.device(options.device).type == "cpu" else "gpu"
    options.json = options.json or RESULTS / f"wan-{kind}.json"
    return options


def main() -> int:
    """Run the benchmark; return 1 if a library failed."""
    options = arguments()
    if options.one:
        print(json.dumps(run_one(options.cases[0], options.one, options)))
        return 0
    rows: list[dict[str, Any]] = []
    for name in options.cases:
        for library in options.libraries:
            rows.append(in_a_process(name, library, options))
            # Written after each row, so that an interrupted run leaves its results.
            reporting.write({**machine(options), "rows": rows}, options.json)
    print("\n".join(show(rows, tiny=options.tiny)))
    return int(any("failed" in row for row in rows))


if __name__ == "__main__":
    sys.exit(main())
