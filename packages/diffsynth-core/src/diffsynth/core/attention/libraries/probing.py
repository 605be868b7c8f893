"""Whether an optional library can be used on the device of a call."""

from __future__ import annotations

import importlib
import importlib.util
import inspect
from collections.abc import Callable
from typing import Any

import torch

from diffsynth.core.attention.call import AttentionCall

_missing: dict[str, str | None] = {}


def missing(module: str) -> str | None:
    """Why a module cannot be imported, or None. Looked up once, without importing it."""
    if module not in _missing:
        package = module.partition(".")[0]
        try:
            is_there = importlib.util.find_spec(package) is not None and importlib.util.find_spec(module) is not None
        except (ImportError, ValueError):
            is_there = False
        _missing[module] = None if is_there else f"{module} is not installed"
    return _missing[module]


# What torch.compiler.assume_constant_result() sets; calling it would load the compiler at import.
missing._dynamo_marked_constant = True  # type: ignore[attr-defined]


def function(module: str, name: str, *arguments: str) -> Callable[..., Any] | str:
    """A library's function, or why it cannot be used: it fails to import, or takes no such arguments.

    A version that does not know an argument would raise in the middle of a run, or not mean what we mean.
    """
    if reason := missing(module):
        return reason
    try:
        found = getattr(importlib.import_module(module), name)
    except (ImportError, OSError, AttributeError, RuntimeError) as error:
        return f"{module}.{name} cannot be imported: {type(error).__name__}: {error}"
    known = inspect.signature(found).parameters
    if any(parameter.kind is inspect.Parameter.VAR_KEYWORD for parameter in known.values()):
        return found
    if unknown := [argument for argument in arguments if argument not in known]:
        return f"{module}.{name} of this version takes no {', '.join(unknown)}"
    return found


def device_refusal(
    name: str, call: AttentionCall, capabilities: range | None = None, *, rocm: bool = False
) -> str | None:
    """Why the device of a call will not do: not CUDA, or of a generation that the library has no kernels for.

    Args:
        name: of the backend.
        call: its tensors say where.
        capabilities: major numbers of the compute capabilities that will do, of NVIDIA's; None is all.
        rocm: whether AMD's devices will do, too.
    """
    device = call.q.device
    if device.type != "cuda":
        return f"tensors are on {device.type}; {name} needs cuda"
    if torch.version.hip is not None:
        return None if rocm else "it has no kernels for ROCm"
    if capabilities is None:
        return None
    major, minor = torch.cuda.get_device_capability(device)
    if major not in capabilities:
        return f"it has no kernels for sm_{major}{minor}; {name} needs sm_{capabilities[0]}x to sm_{capabilities[-1]}x"
    return None


def half_refusal(call: AttentionCall, *, most: int, multiple: int = 8) -> str | None:
    """Why dtype or head dim will not do: half precision, queries as wide as values, up to `most`."""
    if call.q.dtype not in (torch.float16, torch.bfloat16):
        return f"dtype {call.q.dtype} is neither fp16 nor bf16"
    dim, of_values = call.q.shape[-1], call.v.shape[-1]
    if dim != of_values:
        return f"head dim {dim} of queries and {of_values} of values differ"
    if dim > most or dim % multiple:
        return f"head dim {dim} is not a multiple of {multiple} up to {most}"
    return None
