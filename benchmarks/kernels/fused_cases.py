"""Cases of `compile.py` for the fused kernels of `diffsynth.nn`, at the widths of models; equal blocks only once."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from offline import Case

from diffsynth.core.attention.triton import configs
from diffsynth.nn.triton import gated_activation, norm, norm_rotary, sinusoidal

_WIDTHS = {"Z-Image": (3840, 30, 10240), "FLUX": (3072, 24, 12288), "Wan 14B": (5120, 40, 13824)}
"""Width of the hidden states, number of heads of 128, width of the feed-forward layer."""

_STAGES = 3
"""Triton's default for num_stages."""


def cases() -> Iterator[Case]:
    """Yield both norms with all options, RoPE after both kinds of norm, both gated activations, and sinusoids."""
    for arch in configs.TABLE:
        seen = []
        for model, (width, heads, inner) in _WIDTHS.items():
            for kind in ("rms", "layer"):
                yield from _new(seen, _norm(kind, width, model, arch))
            for over in ("each head", "all heads"):
                yield from _new(seen, _norm_rotary(over, heads, width // heads, model, arch))
            for activation in ("silu", "gelu"):
                yield from _new(seen, _gated(activation, inner, model, arch))
        yield _sinusoids(arch)


def _new(seen: list[Any], case: Case) -> Iterator[Case]:
    key = (case.kernel, case.constexprs)
    if key not in seen:
        seen.append(key)
        yield case


def _norm(kind: str, width: int, model: str, arch: int) -> Case:
    types = dict.fromkeys(("x", "weight", "bias", "scale", "shift", "residual", "gate", "out"), "*bf16:16")
    types |= {f"stride_{tensor}{axis}": "i32:16" for tensor in "xchrg" for axis in "bs"}
    types |= {"width": "i32:16", "rows": "i32", "eps": "fp32"}
    flags = {f"HAS_{part}": True for part in ("WEIGHT", "BIAS", "SCALE", "SHIFT", "RESIDUAL")}
    flags |= {"KIND": norm.KINDS.index(kind)}
    return _case(f"norm, {kind}, {model}", norm.norm_fwd_kernel, types, norm.config(width) | flags, arch)


def _norm_rotary(over: str, heads: int, head_dim: int, model: str, arch: int) -> Case:
    types = dict.fromkeys(("x", "weight", "out"), "*bf16:16") | dict.fromkeys(("cos", "sin"), "*fp32:16")
    types |= {f"stride_{tensor}{axis}": "i32:16" for tensor in "xcs" for axis in "bs"}
    types |= dict.fromkeys(("stride_xn", "dim"), "i32:16") | {"tokens": "i32", "heads": "i32", "eps": "fp32"}
    kind = norm_rotary.PER_HEAD if over == "each head" else norm_rotary.ALL_HEADS
    sizes = norm_rotary.config(heads, head_dim) | {"NORM": kind}
    return _case(f"norm of {over} and rope, {model}", norm_rotary.norm_rotary_fwd_kernel, types, sizes, arch)


def _gated(activation: str, width: int, model: str, arch: int) -> Case:
    types = dict.fromkeys(("gate", "up", "out"), "*bf16:16") | {"rows": "i32"}
    types |= dict.fromkeys(("stride_gate", "stride_up", "width"), "i32:16")
    sizes = gated_activation.config(width) | {"GELU": activation == "gelu"}
    return _case(f"gated {activation}, {model}", gated_activation.gated_activation_fwd_kernel, types, sizes, arch)


def _sinusoids(arch: int) -> Case:
    types = {"time": "*fp32:16", "out": "*fp32:16", "stride_time": "i32", "half": "i32:16"}
    sizes = {"MINUS_LOG_PERIOD": -9.2, "BLOCK_H": 128, "num_warps": 1}
    return _case("sinusoids", sinusoidal.sinusoidal_fwd_kernel, types, sizes, arch)


def _case(name: str, kernel: Any, types: dict[str, str], sizes: dict[str, Any], arch: int) -> Case:
    constexprs = dict(sizes)
    warps = constexprs.pop("num_warps")
    first = ("norm, rms, Z-Image", "norm of each head and rope, Z-Image", "gated silu, Z-Image", "sinusoids")
    return Case(name, kernel, types, constexprs, arch, warps, _STAGES, is_default=arch == 90 and name in first)
