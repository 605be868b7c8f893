"""Compare whole calls of FLUX with diffusers: seconds of a call and of a step, peak memory, with compiled blocks.

    python benchmarks/flux.py                          on a GPU: published sizes, random weights, bf16
    python benchmarks/flux.py --cases klein-4b         one case
    python benchmarks/flux.py --tiny                   tiny sizes in fp32 on the CPU

A call encodes a prompt, denoises and decodes one image. Both libraries have networks of the same sizes, with random
weights, and the same number of tokens. Times are medians.

At published sizes each contender runs in its own process. A step is the difference between a call with all steps and
one with half of them, divided by the number of steps between. Memory is the peak of torch's allocator, with weights.

With `--tiny` the time is mostly that of the code around the networks. Both libraries run in one process and take turns,
and times are CPU time of the process, which other work on the machine changes less than the clock. The gap is the time
from the end of one forward pass of the transformer to the beginning of the next: what the library does between two
steps. The ratio is the median over rounds of the time of our call over that of theirs.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import reporting
import torch
from torch import nn

from diffsynth.core import device as devices
from diffsynth.core.loader.component import fill_buffers
from diffsynth.runtime.progress import no_progress
from diffsynth.testing.tiny_processors import byte_tokenizer

RESULTS = Path(__file__).parent / "results"
LIBRARIES = ("diffsynth", "diffusers")
CONTENDERS = ("diffsynth", "diffusers", "diffsynth compiled", "diffusers compiled")
GIB = 2**30
PROMPT = "a red panda reading a newspaper"

GOALS = {"flux.1-dev": 3.5, "klein-4b": 0.40}
"""Seconds of a call on one H200 that we aim at."""


@dataclass(frozen=True)
class Case:
    """A model's sizes, and the call.

    Args:
        line: "flux1" or "flux2".
        steps, side: of the call; height and width are equal, in pixels.
        dit, text, pooled, vae: config fields of the networks; `text` is T5 or Qwen3, `pooled` CLIP.
    """

    line: str
    steps: int
    side: int
    dit: Mapping[str, Any]
    text: Mapping[str, Any]
    vae: Mapping[str, Any]
    pooled: Mapping[str, Any]


KLEIN_4B = {"dim": 3072, "n_heads": 24, "n_layers": 5, "n_single_layers": 20, "prompt_dim": 7680, "ffn_dim": 9216}
FULL = {
    "flux.1-dev": Case("flux1", 28, 1024, {}, {}, {}, {}),
    "klein-4b": Case("flux2", 4, 1024, KLEIN_4B | {"embeds_guidance": False}, {}, {}, {}),
}
NARROW = {"block_out_channels": (8, 8, 16, 16), "layers_per_block": 1, "norm_groups": 4}
TINY = {
    "flux.1-dev": Case(
        "flux1",
        4,
        64,
        {"dim": 64, "n_heads": 2, "n_double_blocks": 1, "n_single_blocks": 2, "context_dim": 64, "pooled_dim": 64},
        {
            "hidden_size": 64,
            "num_layers": 2,
            "num_heads": 2,
            "head_dim": 32,
            "intermediate_size": 96,
            "vocab_size": 512,
        },
        NARROW,
        {"hidden_size": 64, "num_layers": 2, "num_heads": 1, "intermediate_size": 96},
    ),
    "klein-4b": Case(
        "flux2",
        4,
        64,
        {"dim": 64, "n_heads": 2, "n_layers": 1, "n_single_layers": 2, "prompt_dim": 192, "ffn_dim": 192}
        | {"axes_dims": (8, 8, 8, 8), "embeds_guidance": False},
        {"hidden_size": 64, "num_layers": 4, "num_heads": 2, "num_kv_heads": 1, "head_dim": 32}
        | {"intermediate_size": 96, "vocab_size": 512},
        NARROW | {"decoder_block_out_channels": (8, 8, 16, 16)},
        {},
    ),
}


def configs(case: Case) -> dict[str, Any]:
    """Return a dict role -> our config of the networks of a case."""
    from diffsynth.models.config import FluxAutoencoderConfig, Qwen3TextEncoderConfig
    from diffsynth_flux.flux1.config import ClipTextEncoderConfig, FluxDiTConfig, T5TextEncoderConfig
    from diffsynth_flux.flux2.config import Flux2AutoencoderConfig, Flux2DiTConfig

    if case.line == "flux1":
        return {
            "dit": FluxDiTConfig(**case.dit),
            "text_encoder_1": ClipTextEncoderConfig(**case.pooled),
            "text_encoder_2": T5TextEncoderConfig(**case.text),
            "vae": FluxAutoencoderConfig(**case.vae),
        }
    return {
        "dit": Flux2DiTConfig(**case.dit),
        "text_encoder": Qwen3TextEncoderConfig(**case.text),
        "vae": Flux2AutoencoderConfig(**case.vae),
    }


def our_networks(case: Case) -> dict[str, nn.Module]:
    """Return a dict role -> our network; on the current default device."""
    from diffsynth.models.flux_autoencoder import FluxAutoencoder
    from diffsynth.models.qwen3 import Qwen3TextEncoder
    from diffsynth_flux.flux1.dit import FluxDiT
    from diffsynth_flux.flux1.text_encoders import ClipTextEncoder, T5TextEncoder
    from diffsynth_flux.flux2.autoencoder import Flux2Autoencoder
    from diffsynth_flux.flux2.dit import Flux2DiT

    flux1 = {"dit": FluxDiT, "text_encoder_1": ClipTextEncoder, "text_encoder_2": T5TextEncoder, "vae": FluxAutoencoder}
    flux2 = {"dit": Flux2DiT, "text_encoder": Qwen3TextEncoder, "vae": Flux2Autoencoder}
    classes = flux1 if case.line == "flux1" else flux2
    return {role: classes[role](config) for role, config in configs(case).items()}


def their_networks(case: Case) -> dict[str, nn.Module]:
    """Return a dict component of diffusers' pipeline -> network; on the current default device."""
    if case.line == "flux1":
        return _their_flux1(configs(case))
    return _their_flux2(configs(case))


def _their_flux1(ours: dict[str, Any]) -> dict[str, nn.Module]:
    from diffusers import AutoencoderKL, FluxTransformer2DModel
    from transformers import CLIPTextConfig, CLIPTextModel, T5Config, T5EncoderModel

    dit, clip, t5, vae = (ours[role] for role in ("dit", "text_encoder_1", "text_encoder_2", "vae"))
    return {
        "transformer": FluxTransformer2DModel(
            in_channels=dit.in_channels,
            num_layers=dit.n_double_blocks,
            num_single_layers=dit.n_single_blocks,
            attention_head_dim=dit.head_dim,
            num_attention_heads=dit.n_heads,
            joint_attention_dim=dit.context_dim,
            pooled_projection_dim=dit.pooled_dim,
            guidance_embeds=True,
            axes_dims_rope=dit.axes_dims,
        ),
        "text_encoder": CLIPTextModel(
            CLIPTextConfig(
                hidden_size=clip.hidden_size,
                num_hidden_layers=clip.num_layers,
                num_attention_heads=clip.num_heads,
                intermediate_size=clip.intermediate_size,
            )
        ),
        "text_encoder_2": T5EncoderModel(
            T5Config(
                d_model=t5.hidden_size,
                d_kv=t5.head_dim,
                d_ff=t5.intermediate_size,
                num_heads=t5.num_heads,
                num_layers=t5.num_layers,
                vocab_size=t5.vocab_size,
                feed_forward_proj="gated-gelu",
            )
        ),
        "vae": AutoencoderKL(
            down_block_types=("DownEncoderBlock2D",) * 4,
            up_block_types=("UpDecoderBlock2D",) * 4,
            use_quant_conv=False,
            use_post_quant_conv=False,
            norm_num_groups=vae.norm_groups,
            scaling_factor=vae.scaling_factor,
            shift_factor=vae.shift_factor,
            **_widths(vae),
        ),
    }


def _their_flux2(ours: dict[str, Any]) -> dict[str, nn.Module]:
    from diffusers import AutoencoderKLFlux2, Flux2Transformer2DModel
    from transformers import Qwen3Config, Qwen3ForCausalLM

    dit, text, vae = (ours[role] for role in ("dit", "text_encoder", "vae"))
    return {
        "transformer": Flux2Transformer2DModel(
            in_channels=dit.in_channels,
            num_layers=dit.n_layers,
            num_single_layers=dit.n_single_layers,
            attention_head_dim=dit.head_dim,
            num_attention_heads=dit.n_heads,
            joint_attention_dim=dit.prompt_dim,
            mlp_ratio=dit.ffn_dim / dit.dim,
            axes_dims_rope=dit.axes_dims,
            guidance_embeds=False,
        ),
        "text_encoder": Qwen3ForCausalLM(
            Qwen3Config(
                hidden_size=text.hidden_size,
                num_hidden_layers=text.num_layers,
                num_attention_heads=text.num_heads,
                num_key_value_heads=text.num_kv_heads,
                head_dim=text.head_dim,
                intermediate_size=text.intermediate_size,
                vocab_size=text.vocab_size,
                rope_parameters={"rope_theta": text.rope_theta, "rope_type": "default"},
                tie_word_embeddings=True,
            )
        ),
        "vae": AutoencoderKLFlux2(
            decoder_block_out_channels=vae.decoder_block_out_channels,
            norm_num_groups=vae.norm_groups,
            **_widths(vae),
        ),
    }


def _widths(vae: Any) -> dict[str, Any]:
    names = ("block_out_channels", "layers_per_block", "latent_channels")
    return {name: getattr(vae, name) for name in names}


def pipeline(case: Case, library: str, device: torch.device, dtype: torch.dtype) -> tuple[Any, nn.Module]:
    """Return (the pipeline of a library, its transformer), with random weights on `device`."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with device:
            parts: dict[str, Any] = (our_networks if library == "diffsynth" else their_networks)(case)
    finally:
        torch.set_default_dtype(before)
    for part in parts.values():
        _draw(part, device)
        if library == "diffsynth":
            fill_buffers(part)
            part.to(device)
    tokenizer = byte_tokenizer()
    if library == "diffsynth":
        return _ours(case, parts, tokenizer, device, dtype), parts["dit"]
    return _theirs(case, parts, tokenizer), parts["transformer"]


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


def _ours(case: Case, parts: dict[str, Any], tokenizer: Any, device: torch.device, dtype: torch.dtype) -> Any:
    from diffsynth_flux import Flux2ImagePipeline, FluxImagePipeline

    placed = {"device": device, "torch_dtype": dtype}
    if case.line == "flux1":
        return FluxImagePipeline.from_components(**parts, tokenizer_1=tokenizer, tokenizer_2=tokenizer, **placed)
    return Flux2ImagePipeline.from_components(**parts, tokenizer=tokenizer, **placed)


def _theirs(case: Case, parts: dict[str, Any], tokenizer: Any) -> Any:
    from diffusers import FlowMatchEulerDiscreteScheduler, Flux2KleinPipeline, FluxPipeline

    scheduler = FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True)
    if case.line == "flux1":
        tokenizer.model_max_length = 77
        pipe = FluxPipeline(scheduler, tokenizer=tokenizer, tokenizer_2=tokenizer, **parts)
    else:
        pipe = Flux2KleinPipeline(scheduler, tokenizer=tokenizer, is_distilled=True, **parts)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def call_of(case: Case, library: str, pipe: Any) -> Callable[[int], Any]:
    """Return a function: number of steps -> the image of a call."""
    size = {"prompt": PROMPT, "height": case.side, "width": case.side}
    if library == "diffsynth":
        return lambda steps: pipe(**size, num_inference_steps=steps, seed=0, progress_bar_cmd=no_progress)
    if case.line == "flux2":
        layers = len(pipe.text_encoder.model.layers)
        size["text_encoder_out_layers"] = tuple(layers * quarter // 4 for quarter in (1, 2, 3))

    def theirs(steps: int) -> Any:
        return pipe(**size, num_inference_steps=steps, generator=torch.Generator("cpu").manual_seed(0)).images[0]

    return theirs


def timed(run: Callable[[], Any], device: torch.device, clock: Callable[[], float] = time.perf_counter) -> float:
    """Return the seconds that a function takes, until the device has done its work."""
    devices.synchronize(device)
    started = clock()
    run()
    devices.synchronize(device)
    return clock() - started


def run_one(name: str, contender: str, options: argparse.Namespace) -> dict[str, Any]:
    """Measure one contender in this process and return its row."""
    case, device = (TINY if options.tiny else FULL)[name], torch.device(options.device)
    library, _, compiled = contender.partition(" ")
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
        "case": name,
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


def in_turns(name: str, options: argparse.Namespace) -> list[dict[str, Any]]:
    """Measure both libraries in this process, in turns, and return a row of each; see the module's docstring."""
    case, device = (TINY if options.tiny else FULL)[name], torch.device(options.device)
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
            "case": name,
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

    The gap between two calls is among them, one in as many as a call has steps, so the median leaves it out.
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


def in_a_process(name: str, contender: str, options: argparse.Namespace) -> dict[str, Any]:
    """Return the row of one contender, measured in a new process; if that fails, a row with its exit code."""
    given = ["--one", contender, "--cases", name, "--device", options.device]
    given += ["--repeats", str(options.repeats), "--warmup", str(options.warmup)]
    row, failure = reporting.run_alone(__file__, *given)
    return row if failure is None else {"case": name, "contender": contender, "failed": failure}


def show(rows: list[dict[str, Any]]) -> list[str]:
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
    lines = [f"{'':12}{'':20}" + "".join(f"{columns[key][0]:>12}" for key in there)]
    for row in rows:
        head = f"{row['case']:12}{row['contender']:20}"
        if "failed" in row:
            lines.append(f"{head} failed: {row['failed']}")
            continue
        cells = [
            f"{row[key] / columns[key][1]:{columns[key][2]}}" if row.get(key) is not None else "-" for key in there
        ]
        lines.append(head + "".join(f"{cell:>12}" for cell in cells))
    goals = [f"goal on one H200: {name} {GOALS[name]} s a call" for name in dict.fromkeys(row["case"] for row in rows)]
    return lines + (goals if "seconds" in there else [])


def machine(options: argparse.Namespace) -> dict[str, Any]:
    """Return the device, versions and options."""
    facts = reporting.machine(options.device, "diffusers", "transformers", "diffsynth-core", "diffsynth-flux")
    return {**facts, "tiny": options.tiny, "repeats": options.repeats}


def arguments(given: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", nargs="+", choices=FULL, default=list(FULL))
    parser.add_argument("--contenders", nargs="+", choices=CONTENDERS, default=list(CONTENDERS))
    parser.add_argument("--tiny", action="store_true", help="tiny sizes on the CPU, both libraries in turns")
    parser.add_argument("--device", help="default: the first accelerator; cpu with --tiny")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--warmup", type=int, default=1)
    parser.add_argument("--json", type=Path, help="default: benchmarks/results/flux-<gpu|cpu|tiny>.json")
    parser.add_argument("--one", choices=CONTENDERS, help=argparse.SUPPRESS)
    options = parser.parse_args(given)
    options.device = options.device or ("cpu" if options.tiny else str(devices.default_device()))
    kind = "tiny" if options.tiny else "cpu" if torch.device(options.device).type == "cpu" else "gpu"
    options.json = options.json or RESULTS / f"flux-{kind}.json"
    return options


def main() -> int:
    """Run the benchmark; return 1 if a contender failed."""
    options = arguments()
    if options.one:
        print(json.dumps(run_one(options.cases[0], options.one, options)))
        return 0
    if options.tiny:
        torch.set_num_threads(1)  # threads that wait for each other count as CPU time
    rows: list[dict[str, Any]] = []
    for name in options.cases:
        for contender in options.contenders[:1] if options.tiny else options.contenders:
            rows += in_turns(name, options) if options.tiny else [in_a_process(name, contender, options)]
            # Written after each row, so that an interrupted run leaves its results.
            reporting.write({**machine(options), "rows": rows}, options.json)
    print("\n".join(show(rows)))
    return int(any("failed" in row for row in rows))


if __name__ == "__main__":
    sys.exit(main())
