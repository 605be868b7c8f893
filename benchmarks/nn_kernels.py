"""The fused kernels of `diffsynth.nn`: bandwidth on a GPU compared with a plain copy.

    python benchmarks/nn_kernels.py [--tokens 4096 32768] [--json FILE]     on a GPU: checked, then timed
    TRITON_INTERPRET=1 python benchmarks/nn_kernels.py --tiny               every case runs once, on the CPU

Bytes are those that must be read and written at least once; the goal is 0.8 of the speed of a copy. A kernel
that differs from its reference implementation is not timed. Medians of --repeats runs, by events on the device.
Registers and shared memory of the binaries are in `kernels/README.md`.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import platform
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from diffsynth.nn import naive
from diffsynth.nn.triton import gated_activation, norm, norm_rotary, sinusoidal

TOLERANCE = {torch.bfloat16: 2**-6, torch.float32: 1e-4}
"""Largest accepted error, relative to the largest value. The reference rounds after every operation."""

WIDTHS = {"Z-Image": (3840, 30, 10240), "FLUX": (3072, 24, 12288), "Wan 14B": (5120, 40, 13824)}
"""Width of the hidden states, number of heads of 128, width of the feed-forward layer."""


@dataclass(frozen=True)
class Case:
    """One call by kernel and by reference implementation, and the bytes that it must move."""

    name: str
    kernel: Callable[[], Tensor]
    reference: Callable[[], Tensor]
    moved: int


def cases(tokens: int, widths: tuple[int, int, int], device: str, dtype: torch.dtype) -> Iterator[Case]:
    e, n, f = widths
    d = e // n

    def draw(*shape: int, dtype: torch.dtype = dtype) -> Tensor:
        return torch.randn(shape, device=device, dtype=dtype)

    x, residual, weight = draw(1, tokens, e), draw(1, tokens, e), draw(e)
    scale, shift, gate = draw(1, 1, e), draw(1, 1, e), draw(1, 1, e)
    row = x.numel() * x.element_size()
    yield Case(
        "rms norm, scale",
        lambda: norm.norm(x, weight, None, scale, None, None, None, "rms", 1e-6),
        lambda: naive.modulate(naive.rms_norm(x, weight, eps=1e-6), scale),
        2 * row,
    )
    yield Case(
        "layer norm, scale, shift",
        lambda: norm.norm(x, None, None, scale, shift, None, None, "layer", 1e-6),
        lambda: naive.modulate(naive.layer_norm(x, None, None, eps=1e-6), scale, shift),
        2 * row,
    )
    yield Case(
        "rms norm, gated residual",
        lambda: norm.norm(x, weight, None, None, None, residual, gate, "rms", 1e-6),
        lambda: naive.gated_residual(residual, naive.rms_norm(x, weight, eps=1e-6), gate),
        3 * row,
    )
    yield Case(
        "gated residual",
        lambda: norm.norm(x, None, None, None, None, residual, gate, "none", 0.0),
        lambda: naive.gated_residual(residual, x, gate),
        3 * row,
    )
    q, angles = draw(1, tokens, n, d), draw(1, tokens, d // 2, dtype=torch.float32)
    cos, sin = angles.cos(), angles.sin()
    for name, over in (("each head", weight[:d]), ("all heads", weight)):
        yield Case(
            f"rms norm of {name}, rope",
            lambda over=over: norm_rotary.norm_rotary(q, over, cos, sin, 1e-6),
            lambda over=over: naive.rms_norm_rotary(q, over, cos, sin, eps=1e-6),
            2 * row + 2 * cos.numel() * 4,
        )
    a, b = draw(1, tokens, f), draw(1, tokens, f)
    for name, reference in (("silu", naive.swiglu), ("gelu", naive.geglu)):
        yield Case(
            f"{name}, gated",
            lambda name=name: gated_activation.gated_activation(a, b, name),
            lambda reference=reference: reference(a, b),
            3 * a.numel() * a.element_size(),
        )
    times = 1000 * torch.rand(64, device=device)
    yield Case(
        "sinusoids of 64 times",
        lambda: sinusoidal.sinusoidal_embedding(times, 256, 10000.0),
        lambda: naive.sinusoidal_embedding(times, 256, max_period=10000.0),
        64 * 257 * 4,
    )


def error(case: Case) -> float:
    ours, expected = case.kernel().double(), case.reference().double()
    return float((ours - expected).abs().max() / expected.abs().max())


def seconds(call: Callable[[], Any], repeats: int, device: str) -> float:
    """Return the median time of a call in seconds; on a GPU the caches are flushed before each run."""
    if device == "cpu":
        started = time.perf_counter()
        call()
        return time.perf_counter() - started
    flush, times = torch.empty(256 * 2**20, dtype=torch.uint8, device=device), []
    for _ in range(repeats + 3):
        flush.zero_()
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        call()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end) / 1e3)
    return statistics.median(times[3:])


def measure(tokens: list[int], widths: dict[str, tuple[int, int, int]], repeats: int, device: str) -> list[dict]:
    dtype = torch.float32 if device == "cpu" else torch.bfloat16
    rows = []
    for model, sizes in widths.items():
        for count in tokens:
            for case in cases(count, sizes, device, dtype):
                if (off := error(case)) > TOLERANCE[dtype]:
                    sys.exit(
                        f"{case.name}, {model}, {count} tokens: differs from its reference by {off:.1e}; not timed"
                    )
                source = torch.empty(max(case.moved // 2, 1), dtype=torch.uint8, device=device)
                target = torch.empty_like(source)
                copy = seconds(lambda to=target, source=source: to.copy_(source), repeats, device)
                kernel, reference = (seconds(call, repeats, device) for call in (case.kernel, case.reference))
                rows.append(
                    {
                        "case": case.name,
                        "model": model,
                        "tokens": count,
                        "error": off,
                        "kernel_us": kernel * 1e6,
                        "reference_us": reference * 1e6,
                        "gb_per_s": case.moved / kernel / 1e9,
                        "of_copy": copy / kernel,
                        "times_faster": reference / kernel,
                    }
                )
    return rows


def show(rows: list[dict]) -> None:
    names = list(rows[0])
    table = [[f"{row[name]:.3g}" if isinstance(row[name], float) else str(row[name]) for name in names] for row in rows]
    widths = [max(map(len, column)) for column in zip(names, *table, strict=True)]
    for line in (names, *table):
        print("  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, nargs="+", default=[4096, 32768])
    parser.add_argument("--repeats", type=int, default=30)
    parser.add_argument("--tiny", action="store_true", help="on the CPU, in Triton's interpreter")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    if options.tiny:
        rows, device = measure([5], {"tiny": (96, 2, 60)}, 1, "cpu"), "cpu"
    elif torch.cuda.is_available():
        rows, device = measure(options.tokens, WIDTHS, options.repeats, "cuda"), torch.cuda.get_device_name()
    else:
        parser.error("there is no GPU here; use --tiny")
    show(rows)
    if options.json:
        versions = {name: importlib.metadata.version(name) for name in ("torch", "triton")}
        report = {"device": device, "python": platform.python_version(), "versions": versions, "rows": rows}
        options.json.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
