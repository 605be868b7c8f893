"""Public functions and settings called with wrong arguments, and what becomes of them."""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor

from diffsynth.core.loader.config import VRAM_KEYS
from diffsynth.core.vram.policy import Placement
from diffsynth.errors import DiffsynthError, shown

MODULES = tuple(f"diffsynth.sampling.{name}" for name in ("schedule", "solver", "guidance", "noise", "prediction"))
"""Modules whose public functions are called."""

SETTINGS = (
    *("diffsynth.sampling.windows:SlidingWindow", "diffsynth.sampling.schedule:BetaSchedule"),
    *("diffsynth.runtime.controlnet:ControlNetInput", "diffsynth.core.data.audio:Audio"),
    *("diffsynth.runtime.guidance:AdaptiveProjected", "diffsynth.runtime.guidance:RescaledClassifierFree"),
    *("diffsynth.runtime.guidance:ZeroStar", "diffsynth.runtime.acceleration.strategies:TeaCache"),
    *("diffsynth.runtime.acceleration.strategies:FirstBlockCache", "diffsynth.core.vram.policy:Placement"),
    *("diffsynth.runtime.acceleration.strategies:TaylorSeer", "diffsynth.core.vram.policy:Policy"),
    *("diffsynth.runtime.acceleration.step_attention:StepAttention", "diffsynth.core.vram.policy:Auto"),
    "diffsynth.core.loader.config:ModelConfig",
)
"""Classes of settings that callers make."""

_LEFT_OUT = frozenset(
    {
        *("euler_step", "heun_step", "dpmpp_2m_step", "unipc_step", "euler_ancestral_step"),  # only `solve` calls them
        *("image", "inpaint_image", "inpaint_mask", "processor_id"),  # checked with the call
        *("cls", "state", "step", "device", "rand_device", "record", "metadata", "quantize", "clear_parameters"),
        *VRAM_KEYS,
    }
)
"""Functions and parameters that are not tried."""


_FUNCTIONS = frozenset({"velocity", "noise", "on_step", "progress"})
"""Parameters that are the caller's functions, whose errors are its own."""


def _velocity(latents: Tensor, sigma: Any) -> Tensor:
    return latents


USUAL: dict[str, Callable[[], Any]] = {
    "num_steps": lambda: 4,
    "train_steps": lambda: 10,
    "sigmas": lambda: torch.tensor([1.0, 0.5, 0.0]),
    "shift": lambda: 3.0,
    "mu": lambda: 0.8,
    "num_tokens": lambda: 256,
    "velocity": lambda: _velocity,
    "latents": lambda: torch.ones(1, 2),
    "noise": lambda: torch.ones(1, 2),
    "x0": lambda: torch.ones(1, 2),
    "sigma": lambda: torch.ones(1) / 2,
    "velocity_cond": lambda: torch.ones(1, 2),
    "velocity_uncond": lambda: torch.zeros(1, 2),
    "cfg_scale": lambda: 2.0,
    "index": lambda: 0,
    "epsilon": lambda: torch.ones(1, 2),
    "v": lambda: torch.ones(1, 2),
    "shape": lambda: (2,),
    "seeds": lambda: [0],
    "dtype": lambda: torch.float32,
    "device": lambda: "cpu",
    "items": lambda: [1],
    "progress": lambda: iter,
    "size": lambda: 4,
    "stride": lambda: 2,
    "threshold": lambda: 0.1,
    "backend": lambda: "auto",
    "alphas_cumprod": lambda: torch.tensor([0.9, 0.5]),
    "samples": lambda: torch.zeros(1, 8),
    "sample_rate": lambda: 8,
    **dict.fromkeys(("offload", "onload", "preparing", "computation"), lambda: Placement("cpu")),
}
"""Parameter -> function that returns a value which it takes."""

_OTHERS = {
    "ModelConfig": {"path": lambda: "x.safetensors"},
    "euler_ancestral": {"noise": lambda: lambda index: torch.ones(1, 2)},
    **{name: {"noise": lambda: None} for name in ("euler", "heun", "dpmpp_2m", "unipc")},
}
"""Function -> values of parameters that mean something else there."""


def functions() -> dict[str, Callable[..., Any]]:
    """Return a dict name -> function or class that is called with wrong arguments."""
    found = {}
    for name in MODULES:
        module = importlib.import_module(name)
        for own, function in vars(module).items():
            is_own = inspect.isfunction(function) and function.__module__ == name
            if is_own and not own.startswith("_") and own not in _LEFT_OUT and own not in ("solve", "with_progress"):
                found[own] = function
    for reference in SETTINGS:
        name, _, own = reference.partition(":")
        found[own] = getattr(importlib.import_module(name), own)
    return found


def wrong_arguments() -> list[Any]:
    """Return a list of values of many kinds."""
    return [
        *(None, True, -1, 10**400, 0.5, -0.5, 1e300, float("nan"), float("inf"), 1j),
        *("", "0.5", "cpu", "disk", b"x", [], [1.0, 0.5, 0.0], ["a"], (1,), {}, {"a": 1}, object(), int, print),
        *(lambda: None, torch.float32, torch.int8, torch.bool, np.float32(2), np.ones(2), [torch.ones(2)]),
        *(torch.ones(()), torch.ones(3), torch.ones(2, 2), torch.ones(1, 2, dtype=torch.int64), range(3), iter([1])),
    ]


def faults(name: str, function: Callable[..., Any]) -> Iterator[str]:
    """Yield a line for each wrong argument whose error is not one of ours that names it."""
    parameters = inspect.signature(function).parameters
    usual = {key: make for key, make in USUAL.items() if key in parameters} | _OTHERS.get(name, {})
    for parameter in parameters:
        if parameter in _LEFT_OUT:
            continue
        for value in wrong_arguments():
            required = {
                key: make()
                for key, make in usual.items()
                if parameters[key].default is inspect.Parameter.empty or key in _OTHERS.get(name, {})
            }
            if parameter in _FUNCTIONS and callable(value):
                continue
            try:
                result = function(**{**required, parameter: value})
                list(result) if inspect.isgenerator(result) else result
            except (TypeError, ValueError, DiffsynthError) as error:
                if parameter.removesuffix("s") not in str(error) and shown(value) not in str(error):
                    yield f"{name}({parameter}={shown(value)}): {type(error).__name__}: {error!s:.200}"
            except Exception as error:
                yield f"{name}({parameter}={shown(value)}): {type(error).__name__}: {error!s:.200}"
