"""Built-in plugin `core`: networks that two or more families use, and core's solvers, guidances and writers."""

from __future__ import annotations

from collections.abc import Callable

from diffsynth.hookspecs import hookimpl
from diffsynth.models.checkpoints import ARCHITECTURES, CHECKPOINTS
from diffsynth.spec import (
    ArchitectureSpec,
    CheckpointSpec,
    GuidanceSpec,
    QuantizationSpec,
    SolverSpec,
    WriterSpec,
)

DIFFSYNTH_API = 2

SOLVERS = (
    SolverSpec(name="euler", solver="diffsynth.sampling.solver:euler", paper="arXiv:2209.03003"),
    SolverSpec(name="heun", solver="diffsynth.sampling.solver:heun", evaluations_per_step=2, paper="arXiv:2206.00364"),
    SolverSpec(name="dpmpp_2m", solver="diffsynth.sampling.solver:dpmpp_2m", paper="arXiv:2211.01095"),
    SolverSpec(name="unipc", solver="diffsynth.sampling.solver:unipc", paper="arXiv:2302.04867"),
    SolverSpec(
        name="euler_ancestral",
        solver="diffsynth.sampling.solver:euler_ancestral",
        uses_noise=True,
        paper="arXiv:2011.13456",
    ),
)

GUIDANCES = (
    GuidanceSpec(name="cfg", guidance="diffsynth.runtime.guidance:ClassifierFree", paper="arXiv:2207.12598"),
    GuidanceSpec(
        name="rescaled", guidance="diffsynth.runtime.guidance:RescaledClassifierFree", paper="arXiv:2305.08891"
    ),
    GuidanceSpec(name="apg", guidance="diffsynth.runtime.guidance:AdaptiveProjected", paper="arXiv:2410.02416"),
    GuidanceSpec(name="cfg_zero_star", guidance="diffsynth.runtime.guidance:ZeroStar", paper="arXiv:2503.18886"),
)

_QUANT = "diffsynth.core.quant.builtin"

QUANTIZATION = (
    QuantizationSpec(name="fp8_row", backend=f"{_QUANT}:fp8_row", description="fp8, a scale of each output"),
    QuantizationSpec(name="fp8_tensor", backend=f"{_QUANT}:fp8_tensor", description="fp8, a scale of each weight"),
    QuantizationSpec(name="fp8_block", backend=f"{_QUANT}:fp8_block", description="fp8, a scale of each 128 inputs"),
    QuantizationSpec(name="int8_row", backend=f"{_QUANT}:int8_row", description="int8, a scale of each output"),
    QuantizationSpec(name="int8_tensor", backend=f"{_QUANT}:int8_tensor", description="int8, a scale of each weight"),
    QuantizationSpec(name="int8_block", backend=f"{_QUANT}:int8_block", description="int8, a scale of each 128 inputs"),
)

_WRITERS = "diffsynth.runtime.builtin_writers"

WRITERS = (
    WriterSpec(suffix=".png", kind="image", writer=f"{_WRITERS}:write_image", description="PNG"),
    WriterSpec(suffix=".jpg", kind="image", writer=f"{_WRITERS}:write_jpeg", description="JPEG", alpha=False),
    WriterSpec(suffix=".jpeg", kind="image", writer=f"{_WRITERS}:write_jpeg", description="JPEG", alpha=False),
    WriterSpec(
        suffix=".webp",
        kind="image",
        writer=f"{_WRITERS}:write_webp",
        description="WebP; a video as an animation",
        also=("video",),
    ),
    WriterSpec(suffix=".mp4", kind="video", writer=f"{_WRITERS}:write_video", description="MP4, H.264"),
    WriterSpec(suffix=".gif", kind="video", writer=f"{_WRITERS}:write_gif", description="GIF animation, 256 colours"),
    WriterSpec(suffix="/", kind="video", writer=f"{_WRITERS}:write_frames", description="a folder of PNG frames"),
    WriterSpec(suffix=".wav", kind="audio", writer=f"{_WRITERS}:write_audio", description="WAV, 16-bit PCM"),
    WriterSpec(
        suffix=".safetensors",
        kind="tensors",
        writer=f"{_WRITERS}:write_tensors",
        description="tensors, sound or images (as bytes) of any pipeline",
    ),
)


@hookimpl
def register_architectures(register: Callable[[ArchitectureSpec], None]) -> None:
    for architecture in ARCHITECTURES:
        register(architecture)


@hookimpl
def register_checkpoints(register: Callable[[CheckpointSpec], None]) -> None:
    for checkpoint in CHECKPOINTS:
        register(checkpoint)


@hookimpl
def register_solvers(register: Callable[[SolverSpec], None]) -> None:
    for solver in SOLVERS:
        register(solver)


@hookimpl
def register_guidance(register: Callable[[GuidanceSpec], None]) -> None:
    for guidance in GUIDANCES:
        register(guidance)


@hookimpl
def register_quantization(register: Callable[[QuantizationSpec], None]) -> None:
    for method in QUANTIZATION:
        register(method)


@hookimpl
def register_writers(register: Callable[[WriterSpec], None]) -> None:
    for writer in WRITERS:
        register(writer)
