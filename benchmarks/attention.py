"""Attention on a GPU: correctness, and speed compared with the other installed backends.

    python benchmarks/attention.py                                  all cases, all backends, JSON under results/
    python benchmarks/attention.py --cases wan --passes fwd --contenders triton sdpa_flash
    TRITON_INTERPRET=1 python benchmarks/attention.py --device cpu --tiny     check that the script runs

First outputs and gradients are compared with the reference in fp64, at sizes that do not fit the blocks; a backend that
fails is not timed. Then each case is timed by events, the median of `--repeats`, with the order of backends rotated in
each round, and 16 queries of two heads of its output are compared with the reference. Upper bounds are measured on the
same machine: a large matrix product, and a copy.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import diffsynth
from diffsynth.core.attention import AttentionCall, attention
from diffsynth.core.attention.call import checked_call
from diffsynth.core.attention.naive import NaiveAttention
from diffsynth.core.attention.registry import refusal
from diffsynth.core.device.speed import compute_speed

CONTENDERS = ("triton", "sdpa_flash", "sdpa_cudnn", "sdpa_efficient", "sdpa", "flash_attention_3", "flash_attention_2")
TOLERANCE = {torch.float16: 4e-3, torch.bfloat16: 3e-2, torch.float32: 1e-4}
"""Largest accepted error, relative to the largest value."""


@dataclass(frozen=True)
class Case:
    """One attention call of a model.

    Args:
        name: model, and the variant of the call.
        q_len, k_len, heads, kv_heads, dim: sizes; the batch size is 1.
        padded: number of keys at the end that a mask `b 1 1 k` excludes.
        packed: lengths of the packed samples.
        causal, window: as for `attention`.
    """

    name: str
    q_len: int
    k_len: int
    heads: int
    kv_heads: int
    dim: int = 128
    padded: int = 0
    packed: tuple[int, ...] = ()
    causal: bool = False
    window: tuple[int, int] | None = None

    def arguments(self, device: str) -> dict[str, Any]:
        """Return the arguments of the call beside q, k and v."""
        given: dict[str, Any] = {"causal": self.causal, "window": self.window}
        if self.padded:
            given["mask"] = (torch.arange(self.k_len, device=device) < self.k_len - self.padded)[None, None, None]
        if self.packed:
            given["cu_seqlens"] = torch.tensor([0, *self.packed], dtype=torch.int32).cumsum(0, dtype=torch.int32)
        return given

    def pairs(self) -> float:
        """Return the number of allowed pairs of queries and keys."""
        if self.packed:
            return sum(length**2 for length in self.packed)
        keys = self.k_len - self.padded
        left, right = (self.window or (-1, -1)) if not self.causal else (-1, 0)
        total = 0
        for i in range(self.q_len):
            aligned = i + self.k_len - self.q_len
            first = max(0, aligned - left) if left >= 0 else 0
            last = min(keys, aligned + right + 1) if right >= 0 else keys
            total += max(0, last - first)
        return total

    def flop(self, direction: str) -> float:
        """Return the FLOP of two matrix products forward, or of five backward."""
        return {"fwd": 4, "bwd": 10}[direction] * self.pairs() * self.dim * self.heads


CASES = (
    Case("goal: 16k", 16384, 16384, 16, 16),
    Case("goal: 16k causal", 16384, 16384, 16, 16, causal=True),
    Case("flux 1024x1024", 4608, 4608, 24, 24),
    Case("qwen-image 1328x1328", 7145, 7145, 24, 24),
    Case("qwen-image 1328x1328, padded prompt", 7145, 7145, 24, 24, padded=200),
    Case("z-image 1024x1024", 4224, 4224, 30, 30),
    Case("z-image, four prompts packed", 16500, 16500, 30, 30, packed=(4096, 4103, 4150, 4151)),
    Case("wan 480p", 32760, 32760, 40, 40),
    Case("wan 480p, windowed", 32760, 32760, 40, 40, window=(4680, 4680)),
    Case("wan 720p", 75600, 75600, 40, 40),
    Case("wan 720p, cross", 75600, 512, 40, 40),
    Case("wan 720p, cross, padded prompt", 75600, 512, 40, 40, padded=385),
    Case("text encoder, grouped heads, causal", 2048, 2048, 32, 8, causal=True),
)
TINY = (
    Case("tiny", 40, 40, 2, 2, 16),
    Case("tiny, padded", 40, 33, 2, 2, 16, padded=20),
    Case("tiny, packed", 40, 40, 2, 1, 16, packed=(7, 33)),
    Case("tiny, windowed", 40, 40, 2, 2, 16, window=(5, 3)),
)
CHECKED = (
    Case("one pair", 1, 1, 2, 2, 64),
    Case("odd", 111, 257, 4, 2, 64),
    Case("wide", 130, 100, 2, 2, 256),
    Case("narrow", 63, 111, 2, 1, 24),
    Case("causal", 257, 300, 2, 2, 128, causal=True),
    Case("windowed", 257, 200, 2, 2, 96, window=(40, 9)),
    Case("padded", 200, 257, 2, 2, 128, padded=100),
    Case("packed", 300, 300, 2, 2, 128, packed=(1, 0, 64, 235)),
)


def draw(case: Case, device: str, dtype: torch.dtype) -> list[Tensor]:
    """Return random q, k and v, all with requires_grad."""
    generator = torch.Generator(device).manual_seed(0)
    sizes = ((case.q_len, case.heads), (case.k_len, case.kv_heads), (case.k_len, case.kv_heads))
    return [
        torch.randn(1, *size, case.dim, generator=generator, device=device, dtype=dtype).requires_grad_()
        for size in sizes
    ]


def off(got: Tensor, wanted: Tensor) -> float:
    """Return the largest error, relative to the largest value; infinity if a value is not finite."""
    got, wanted = got.detach(), wanted.detach()
    if not bool(got.isfinite().all()):
        return float("inf")
    return float((got.double() - wanted).abs().max() / wanted.abs().max().clamp(min=1e-3))


def check_contender(name: str, cases: tuple[Case, ...], device: str, dtype: torch.dtype) -> dict[str, str]:
    """Return the errors of outputs and gradients by case; refused cases are skipped."""
    wrong = {}
    for case in cases:
        tensors = draw(case, device, dtype)
        arguments = case.arguments(device)
        if refusal(name, checked_call(*tensors, **arguments)) is not None:
            continue
        truth = [tensor.detach().double().requires_grad_() for tensor in tensors]
        out = attention(*tensors, **arguments, backend=name)
        expected = NaiveAttention()(checked_call(*truth, **arguments))
        d_out = torch.randn(out.shape, device=device).to(dtype)
        out.backward(d_out)
        expected.backward(d_out.double())
        errors = {"out": off(out, expected)}
        errors |= {f"d{letter}": off(x.grad, y.grad) for letter, x, y in zip("qkv", tensors, truth, strict=True)}
        if worst := {what: error for what, error in errors.items() if error > TOLERANCE[dtype]}:
            wrong[case.name] = ", ".join(f"{what} off by {error:.1e}" for what, error in worst.items())
    return wrong


def spot_error(call: AttentionCall, case: Case, out: Tensor) -> float:
    """Return the error of 16 queries of the first and the last head."""
    rows = torch.randint(case.q_len, (16,), generator=torch.Generator().manual_seed(1)).to(out.device)
    heads = torch.tensor([0, case.heads - 1], device=out.device)
    keys = torch.arange(case.k_len, device=out.device)
    aligned = (rows + case.k_len - case.q_len)[:, None]
    left, right = call.limits
    allowed = (keys < case.k_len - case.padded).expand(16, -1).clone()
    if left >= 0:
        allowed &= keys >= aligned - left
    if right >= 0:
        allowed &= keys <= aligned + right
    if call.cu_seqlens is not None:
        ends = call.cu_seqlens[0][1:]
        allowed &= torch.bucketize(rows, ends, right=True)[:, None] == torch.bucketize(keys, ends, right=True)
    q = call.q.detach()[:, rows][:, :, heads].double()
    k, v = (x.detach()[:, :, heads // call.q_per_kv].double() for x in (call.k, call.v))
    expected = NaiveAttention()(checked_call(q, k, v, mask=allowed[None, None], scale=call.scale))
    return off(out[:, rows][:, :, heads], expected)


@dataclass
class Clock:
    """Measured milliseconds of a function: by events on an accelerator, else by the wall clock."""

    device: str
    times: list[float] = field(default_factory=list)

    def measure(self, run: Callable[[], object]) -> None:
        """Run the function once, and append its time to `times`."""
        if self.device == "cpu":
            started = time.perf_counter()
            run()
            self.times.append(1e3 * (time.perf_counter() - started))
            return
        begin, end = torch.Event(self.device, enable_timing=True), torch.Event(self.device, enable_timing=True)
        begin.record()
        run()
        end.record()
        end.synchronize()
        self.times.append(begin.elapsed_time(end))


def runs(case: Case, names: list[str], direction: str, args: argparse.Namespace) -> tuple[dict, dict]:
    """Return a function to time for each backend, and the reason or error of those that are not timed."""
    dtype = getattr(torch, args.dtype)
    tensors = draw(case, args.device, dtype)
    if direction == "fwd":
        tensors = [tensor.detach() for tensor in tensors]
    arguments = case.arguments(args.device)
    call = checked_call(*tensors, **arguments)
    ready, left_out = {}, {}
    for name in names:
        if (reason := refusal(name, call)) is not None:
            left_out[name] = f"refuses: {reason}"
            continue
        try:
            out = attention(*tensors, **arguments, backend=name)
            error = spot_error(call, case, out)
        except (RuntimeError, torch.OutOfMemoryError) as failure:
            left_out[name] = f"fails: {str(failure).splitlines()[0]}"
            continue
        if error > TOLERANCE[dtype]:
            left_out[name] = f"wrong: 16 queries are off by {error:.1e}"
        elif direction == "fwd":
            ready[name] = lambda name=name: attention(*tensors, **arguments, backend=name)
        else:
            d_out = torch.randn_like(out)
            ready[name] = lambda out=out, d_out=d_out: torch.autograd.grad(out, tensors, d_out, retain_graph=True)
    return ready, left_out


def time_case(case: Case, direction: str, args: argparse.Namespace, names: list[str]) -> dict[str, Any]:
    """Return median milliseconds and TFLOP/s of each backend."""
    ready, left_out = runs(case, names, direction, args)
    clocks = {name: Clock(args.device) for name in ready}
    for run in ready.values():
        for _ in range(args.warmup):
            run()
    order = list(ready)
    for _ in range(args.repeats):
        for name in order:
            clocks[name].measure(ready[name])
        order = order[1:] + order[:1]
    result: dict[str, Any] = {"flop": case.flop(direction), "left_out": left_out, "contenders": {}}
    for name, clock in clocks.items():
        median = statistics.median(clock.times)
        tflops = result["flop"] / median / 1e9
        result["contenders"][name] = {"ms": median, "best_ms": min(clock.times), "tflop_per_s": tflops}
    return result


def copy_speed(device: str) -> float:
    """Return the bytes/s read and written by a copy of 256 MiB on the device."""
    source = torch.zeros(2**28 if device != "cpu" else 2**22, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    clock = Clock(device)
    for _ in range(8):
        clock.measure(lambda: target.copy_(source))
    return 2 * source.numel() / statistics.median(clock.times[3:]) * 1e3


def machine(args: argparse.Namespace) -> dict[str, Any]:
    """Return versions, the name of the GPU, and its upper bounds."""
    try:
        import triton

        of_triton = triton.__version__
    except ImportError:
        of_triton = None
    on_gpu = args.device != "cpu"
    peak = compute_speed(args.device, getattr(torch, args.dtype))
    return {
        "device": torch.cuda.get_device_name(args.device) if on_gpu else platform.processor() or platform.machine(),
        "diffsynth": diffsynth.__version__,
        "torch": torch.__version__,
        "triton": of_triton,
        "cuda": torch.version.cuda,
        "cudnn": torch.backends.cudnn.version() if on_gpu else None,
        "python": platform.python_version(),
        "dtype": args.dtype,
        "product_tflop_per_s": {"value": peak.value / 1e12, "measured": peak.measured, "source": peak.source},
        "copy_gb_per_s": copy_speed(args.device) / 1e9,
    }


def main() -> int:
    """Return 1 if the backend `triton` is wrong."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--dtype", choices=["bfloat16", "float16", "float32"], default="bfloat16")
    parser.add_argument("--cases", default="", help="substring of a case's name")
    parser.add_argument("--contenders", nargs="+", default=list(CONTENDERS), help="names of backends")
    parser.add_argument("--passes", nargs="+", choices=["fwd", "bwd"], default=["fwd", "bwd"])
    parser.add_argument("--repeats", type=int, default=20)
    parser.add_argument("--warmup", type=int, default=3)
    parser.add_argument("--tiny", action="store_true", help="small sizes, for Triton's interpreter on a CPU")
    parser.add_argument("--json", type=Path, help="default: results/attention-<device>.json beside this file")
    args = parser.parse_args()
    facts = machine(args)
    print(json.dumps(facts))
    checked = TINY if args.tiny else CHECKED
    wrong = {name: check_contender(name, checked, args.device, getattr(torch, args.dtype)) for name in args.contenders}
    wrong = {name: found for name, found in wrong.items() if found}
    for name, found in wrong.items():
        print(f"WRONG, not timed: {name}: {found}", file=sys.stderr)
    names = [name for name in args.contenders if name not in wrong]
    report: dict[str, Any] = {**facts, "wrong": wrong, "cases": {}}
    for case in TINY if args.tiny else CASES:
        for direction in args.passes if args.cases in case.name else ():
            result = report["cases"][f"{case.name} | {direction}"] = time_case(case, direction, args, names)
            for name, row in result["contenders"].items():
                print(f"{case.name} | {direction} | {name}: {row['ms']:.3f} ms, {row['tflop_per_s']:.1f} TFLOP/s")
            for name, reason in result["left_out"].items():
                print(f"{case.name} | {direction} | {name} {reason}")
    slug = "-".join(facts["device"].lower().split())
    target = args.json or Path(__file__).parent / "results" / f"attention-{slug}.json"
    target.write_text(json.dumps(report, indent=1) + "\n")
    return int("triton" in wrong)


if __name__ == "__main__":
    sys.exit(main())
