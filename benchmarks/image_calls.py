"""Whole calls of image pipelines of ours and of diffusers', measured side by side: seconds of a call and of a step, and
peak memory, with and without compiled blocks.

`flux.py`, `qwen_image.py` and `z_image.py` list models and build their pipelines; this module measures them and prints
a table. A call encodes a prompt, denoises and decodes one image. Both libraries have networks of the same sizes, with
random weights, and the same number of image tokens and steps. Times are medians.

At published sizes, in bf16, each contender runs in its own process. A step is the difference between a call with all
steps and one with half of them, divided by the number of steps between. Memory is the peak of torch's allocator, with
weights.

With `--tiny`, in fp32 on the CPU, the time is mostly that of the code around the networks. Both libraries run in one
process, on one thread, and take turns, and times are CPU time of the process, which other work on the machine changes
less than the clock. The gap is the time from the end of one forward pass of the transformer to the beginning of the
next: what the library does between two of them. The ratio is the median over rounds of the time of our call over that
of theirs.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import reporting
import torch
from torch import nn

from diffsynth.core import device as devices
from diffsynth.core.loader.component import fill_buffers
from diffsynth.runtime.progress import no_progress

RESULTS = Path(__file__).parent / "results"
LIBRARIES = ("diffsynth", "diffusers")
CONTENDERS = ("diffsynth", "diffusers", "diffsynth-compiled", "diffusers-compiled")
GIB = 2**30
PROMPT = "a red panda reading a newspaper"

TINY_AUTOENCODER = {"block_out_channels": (8, 8, 16, 16), "layers_per_block": 1, "norm_groups": 4}
"""Config fields of a tiny autoencoder of FLUX.1's kind."""


class Line(ABC):
    """The pipelines of a line of models, ours and diffusers', and how to call them."""

    networks: ClassVar[Mapping[str, tuple[type, type[nn.Module]]]]
    """Role of our pipeline -> (config class, network class)."""

    def configs(self, sizes: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
        """Return a dict role -> our config, with the fields that `sizes` has for the role; others are as published."""
        return {role: config(**sizes.get(role, {})) for role, (config, _) in self.networks.items()}

    def our_networks(self, configs: Mapping[str, Any]) -> dict[str, nn.Module]:
        """Return a dict role -> our network; on the current default device."""
        return {role: network(configs[role]) for role, (_, network) in self.networks.items()}

    @abstractmethod
    def their_networks(self, configs: Mapping[str, Any]) -> dict[str, nn.Module]:
        """Return a dict component of diffusers' pipeline -> network of the same size; on the current default device."""

    @abstractmethod
    def our_pipeline(self, parts: Mapping[str, nn.Module], device: torch.device, dtype: torch.dtype) -> Any:
        """Return our pipeline of networks."""

    @abstractmethod
    def their_pipeline(self, parts: Mapping[str, nn.Module]) -> Any:
        """Return diffusers' pipeline of networks."""

    def our_arguments(self, side: int) -> dict[str, Any]:
        """Return further arguments of our call, for an image of `side` pixels."""
        return {}

    def their_arguments(self, pipe: Any, side: int) -> dict[str, Any]:
        """Return further arguments of diffusers' call, for an image of `side` pixels."""
        return {}


@dataclass(frozen=True)
class Case:
    """A call, and the sizes of the networks.

    Args:
        line: of the model.
        steps, side: of the call; height and width are equal, in pixels.
        sizes: role of our pipeline -> config fields; a role that is missing has the published sizes.
    """

    line: Line
    steps: int
    side: int
    sizes: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)


@dataclass(frozen=True)
class Benchmark:
    """The cases of a script.

    Args:
        script: path of the script; the JSON files have its name.
        distribution: whose version is reported.
        full, tiny: name -> case, at published sizes and at tiny ones, with the same names.
        goals: name -> seconds of a call on one H200 that we aim at.
    """

    script: str
    distribution: str
    full: Mapping[str, Case]
    tiny: Mapping[str, Case]
    goals: Mapping[str, float]

    @property
    def name(self) -> str:
        """Name of the script without suffix, with hyphens."""
        return Path(self.script).stem.replace("_", "-")


def their_autoencoder(vae: Any) -> dict[str, Any]:
    """Return a dict of arguments of diffusers' autoencoders for our config `vae`, which both FLUX lines share."""
    names = ("block_out_channels", "layers_per_block", "latent_channels")
    return {"norm_num_groups": vae.norm_groups} | {name: getattr(vae, name) for name in names}


def their_flux_autoencoder(vae: Any) -> nn.Module:
    """Return diffusers' autoencoder of FLUX.1 and Z-Image for our config `vae`."""
    from diffusers import AutoencoderKL

    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        use_quant_conv=False,
        use_post_quant_conv=False,
        scaling_factor=vae.scaling_factor,
        shift_factor=vae.shift_factor,
        **their_autoencoder(vae),
    )


def their_language_model(text: Any) -> dict[str, Any]:
    """Return a dict of arguments of transformers' configs of Qwen's language models for our config `text`."""
    return {
        "hidden_size": text.hidden_size,
        "num_hidden_layers": text.num_layers,
        "num_attention_heads": text.num_heads,
        "num_key_value_heads": text.num_kv_heads,
        "intermediate_size": text.intermediate_size,
        "vocab_size": text.vocab_size,
    }


def pipeline(case: Case, library: str, device: torch.device, dtype: torch.dtype) -> tuple[Any, nn.Module]:
    """Return (the pipeline of a library, its transformer), with random weights on `device`."""
    line, before = case.line, torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with device:
            parts = (line.our_networks if library == "diffsynth" else line.their_networks)(line.configs(case.sizes))
    finally:
        torch.set_default_dtype(before)
    for part in parts.values():
        _draw(part, device)
        if library == "diffsynth":
            fill_buffers(part)
            part.to(device)
    if library == "diffsynth":
        return line.our_pipeline(parts, device, dtype), parts["dit"]
    pipe = line.their_pipeline(parts)
    pipe.set_progress_bar_config(disable=True)
    return pipe, parts["transformer"]


def _draw(module: nn.Module, device: torch.device) -> None:
    """Draw weights that keep the size of activations: products with subnormal numbers take many times as long."""
    generator = torch.Generator(device).manual_seed(0)
    for name, parameter in module.eval().requires_grad_(False).named_parameters():
        if parameter.ndim > 1:
            parameter.normal_(std=parameter[0].numel() ** -0.5, generator=generator)
        elif name.endswith("bias"):
            parameter.normal_(std=0.1, generator=generator)
        else:
            parameter.uniform_(0.9, 1.1, generator=generator)


def call_of(case: Case, library: str, pipe: Any) -> Callable[[int], Any]:
    """Return a function: number of steps -> the image of a call."""
    size = {"prompt": PROMPT, "height": case.side, "width": case.side}
    if library == "diffsynth":
        ours = size | {"seed": 0, "progress_bar_cmd": no_progress} | case.line.our_arguments(case.side)
        return lambda steps: pipe(num_inference_steps=steps, **ours)
    theirs = size | case.line.their_arguments(pipe, case.side)
    return lambda steps: pipe(
        num_inference_steps=steps, generator=torch.Generator("cpu").manual_seed(0), **theirs
    ).images[0]


def timed(run: Callable[[], Any], device: torch.device, clock: Callable[[], float] = time.perf_counter) -> float:
    """Return the seconds that a function takes, until the device has done its work."""
    devices.synchronize(device)
    started = clock()
    run()
    devices.synchronize(device)
    return clock() - started


def run_one(case: Case, contender: str, options: argparse.Namespace) -> dict[str, Any]:
    """Measure one contender in this process and return its row, without the name of the case."""
    device = torch.device(options.device)
    library, _, compiled = contender.partition("-")
    dtype = torch.float32 if device.type == "cpu" else torch.bfloat16
    with torch.no_grad():
        pipe, transformer = pipeline(case, library, device, dtype)
        if compiled:
            _compile(library, pipe, transformer)
        call = call_of(case, library, pipe)
        first = timed(lambda: call(case.steps), device)
        for _ in range(options.warmup - 1):
            call(case.steps)
        devices.reset_peak_memory(device)
        calls = [timed(lambda: call(case.steps), device) for _ in range(options.repeats)]
        half = statistics.median(timed(lambda: call(case.steps // 2), device) for _ in range(options.repeats))
    seconds = statistics.median(calls)
    return {
        "contender": contender,
        "steps": case.steps,
        "side": case.side,
        "seconds": seconds,
        "seconds_per_step": (seconds - half) / (case.steps - case.steps // 2),
        "first_call": first,
        "memory": devices.peak_memory(device),
    }


def _compile(library: str, pipe: Any, transformer: nn.Module) -> None:
    if library == "diffsynth":
        pipe.compile_pipeline(dynamic=False)
    else:
        transformer.compile_repeated_blocks(fullgraph=True)


def in_turns(case: Case, options: argparse.Namespace) -> list[dict[str, Any]]:
    """Measure both libraries in this process, in turns, and return a row of each, without the name of the case."""
    device = torch.device(options.device)
    made = {library: pipeline(case, library, device, torch.float32) for library in LIBRARIES}
    calls = {library: call_of(case, library, pipe) for library, (pipe, _) in made.items()}
    gaps: dict[str, list[float]] = {library: [] for library in LIBRARIES}
    networks: dict[str, list[float]] = {library: [] for library in LIBRARIES}
    for library, (_, transformer) in made.items():
        _note_gaps(transformer, gaps[library], networks[library])
    seconds: dict[str, list[float]] = {library: [] for library in LIBRARIES}
    for turn in range(options.warmup + options.repeats):
        for library in LIBRARIES if turn % 2 else LIBRARIES[::-1]:
            with torch.no_grad():
                spent = timed(lambda library=library: calls[library](case.steps), device, time.process_time)
            if turn >= options.warmup:
                seconds[library].append(spent)
    ratio = statistics.median(ours / theirs for ours, theirs in zip(*seconds.values(), strict=True))
    return [
        {
            "contender": library,
            "steps": case.steps,
            "side": case.side,
            "cpu_seconds": statistics.median(seconds[library]),
            "network_seconds": statistics.median(networks[library]),
            "gap_seconds": statistics.median(gaps[library]),
        }
        | ({"ratio": ratio} if library == "diffsynth" else {})
        for library in LIBRARIES
    ]


def _note_gaps(transformer: nn.Module, gaps: list[float], networks: list[float]) -> None:
    """Record the CPU time of each forward pass of a network, and that between two passes.

    The gap between two calls is among them, one in as many as a call has passes, so the median leaves it out.
    """
    clock = {"began": 0.0, "ended": 0.0}

    def begin(*_: Any) -> None:
        clock["began"] = time.process_time()
        if clock["ended"]:
            gaps.append(clock["began"] - clock["ended"])

    def end(*_: Any) -> None:
        clock["ended"] = time.process_time()
        networks.append(clock["ended"] - clock["began"])

    transformer.register_forward_pre_hook(begin)
    transformer.register_forward_hook(end)


def in_a_process(benchmark: Benchmark, name: str, contender: str, options: argparse.Namespace) -> dict[str, Any]:
    """Return the row of one contender, measured in a new process; if that fails, a row with its exit code."""
    given = ["--one", contender, "--cases", name, "--device", options.device]
    given += ["--repeats", str(options.repeats), "--warmup", str(options.warmup)]
    row, failure = reporting.run_alone(benchmark.script, *given)
    return {"case": name, **(row if failure is None else {"contender": contender, "failed": failure})}


def show(benchmark: Benchmark, rows: list[dict[str, Any]]) -> list[str]:
    """Return the lines of the table."""
    columns = {
        "seconds": ("s/call", 1, ".3f"),
        "seconds_per_step": ("s/step", 1, ".4f"),
        "memory": ("GiB", GIB, ".2f"),
        "cpu_seconds": ("CPU s/call", 1, ".4f"),
        "network_seconds": ("network ms", 1e-3, ".2f"),
        "gap_seconds": ("gap ms", 1e-3, ".3f"),
        "ratio": ("ratio", 1, ".3f"),
    }
    there = [key for key in columns if any(row.get(key) is not None for row in rows)]
    lines = [f"{'':16}{'':20}" + "".join(f"{columns[key][0]:>12}" for key in there)]
    for row in rows:
        head = f"{row['case']:16}{row['contender']:20}"
        if "failed" in row:
            lines.append(f"{head} failed: {row['failed']}")
            continue
        cells = [
            f"{row[key] / columns[key][1]:{columns[key][2]}}" if row.get(key) is not None else "-" for key in there
        ]
        lines.append(head + "".join(f"{cell:>12}" for cell in cells))
    goals = [
        f"goal on one H200: {name} {benchmark.goals[name]} s a call"
        for name in dict.fromkeys(row["case"] for row in rows)
        if name in benchmark.goals
    ]
    return lines + (goals if "seconds" in there else [])


def arguments(benchmark: Benchmark, description: str | None, given: list[str] | None = None) -> argparse.Namespace:
    """Return the options of a script, from `given` or the command line."""
    parser = argparse.ArgumentParser(
        description=f"{description}\n{__doc__}", formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--cases", nargs="+", choices=benchmark.full, default=list(benchmark.full))
    parser.add_argument("--contenders", nargs="+", choices=CONTENDERS, default=list(CONTENDERS))
    parser.add_argument("--tiny", action="store_true", help="tiny sizes on the CPU, both libraries in turns")
    parser.add_argument("--device", help="default: the first accelerator; cpu with --tiny")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--warmup", type=int, default=1)
    parser.add_argument("--json", type=Path, help="default: benchmarks/results/<script>-<gpu|cpu|tiny>.json")
    parser.add_argument("--one", choices=CONTENDERS, help=argparse.SUPPRESS)
    options = parser.parse_args(given)
    options.device = options.device or ("cpu" if options.tiny else str(devices.default_device()))
    kind = "tiny" if options.tiny else "cpu" if torch.device(options.device).type == "cpu" else "gpu"
    options.json = options.json or RESULTS / f"{benchmark.name}-{kind}.json"
    return options


def main(benchmark: Benchmark, description: str | None) -> int:
    """Run a benchmark; return 1 if a contender failed."""
    options = arguments(benchmark, description)
    cases = benchmark.tiny if options.tiny else benchmark.full
    if options.one:
        print(json.dumps(run_one(cases[options.cases[0]], options.one, options)))
        return 0
    if options.tiny:
        torch.set_num_threads(1)  # threads that wait for each other count as CPU time
    facts = reporting.machine(options.device, "diffusers", "transformers", "diffsynth-core", benchmark.distribution)
    facts |= {"tiny": options.tiny, "repeats": options.repeats}
    rows: list[dict[str, Any]] = []
    for name in options.cases:
        for contender in options.contenders[:1] if options.tiny else options.contenders:
            if options.tiny:
                rows += [{"case": name, **row} for row in in_turns(cases[name], options)]
            else:
                rows.append(in_a_process(benchmark, name, contender, options))
            # Written after each row, so that an interrupted run leaves its results.
            reporting.write({**facts, "rows": rows}, options.json)
    print("\n".join(show(benchmark, rows)))
    return int(any("failed" in row for row in rows))
