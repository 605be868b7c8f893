"""Checks whether an optional library can serve a call: installation, version, device, dtype and head dim."""

from __future__ import annotations

import importlib
import inspect
import sys
from collections.abc import Callable
from importlib.machinery import PathFinder
from typing import Any

import torch

from diffsynth.core.attention.call import AttentionCall

_missing: dict[str, str | None] = {}
_refusals: dict[tuple[str, ...], str | None] = {}
_functions: dict[tuple[str, str], Callable[..., Any]] = {}


def clear_cache() -> None:
    """Forget which libraries and functions were found or refused, so that `function_refusal` looks them up again."""
    for cache in (_missing, _refusals, _functions):
        cache.clear()


def missing(module: str) -> str | None:
    """Return the text "MODULE is not installed", or None if it is; looked up once per module, without importing its
    package.
    """
    if module not in _missing:
        _missing[module] = None if _is_installed(module) else f"{module} is not installed"
    return _missing[module]


def function_refusal(module: str, name: str, *arguments: str) -> str | None:
    """Return a text why a library's function cannot be used (not installed, not importable, or without one of
    `arguments`), or None if it can.

    Arguments are checked because another version would raise in the middle of a run.
    """
    key = (module, name, *arguments)
    if key not in _refusals:
        _refusals[key] = missing(module) or _function_refusal(module, name, arguments)
    return _refusals[key]


def function(module: str, name: str) -> Callable[..., Any]:
    """Return the callable `name` of the library `module`; raise KeyError if `function_refusal` has not imported it
    before.
    """
    return _functions[module, name]


def _major_and_minor(index: int | None) -> tuple[int, int]:
    return torch.cuda.get_device_capability(index)


# The attribute that torch.compiler.assume_constant_result() sets; calling it would import the compiler.
for _constant in (missing, function_refusal, _major_and_minor):
    _constant._dynamo_marked_constant = True  # type: ignore[attr-defined]


def device_refusal(
    name: str, call: AttentionCall, capabilities: range | None = None, *, rocm: bool = False
) -> str | None:
    """Return a text why the device of a call is not supported (not CUDA, ROCm unless `rocm`, or a compute capability
    whose major number is not in `capabilities`), or None if it is.

    Args:
        name: name of the backend, for the message.
        call: the call, whose tensors are on the device.
        capabilities: supported major numbers of NVIDIA's compute capabilities; None is all.
        rocm: whether AMD devices are supported.
    """
    device = call.q.device
    if device.type != "cuda":
        return f"tensors are on {device.type}; {name} needs cuda"
    if torch.version.hip is not None:
        return None if rocm else "it has no kernels for ROCm"
    if capabilities is None:
        return None
    major, minor = _major_and_minor(device.index)
    if major not in capabilities:
        return f"it has no kernels for sm_{major}{minor}; {name} needs sm_{capabilities[0]}x to sm_{capabilities[-1]}x"
    return None


def half_refusal(call: AttentionCall, *, max_head_dim: int) -> str | None:
    """Return a text why a call's dtype (not fp16 or bf16) or head dims (over `max_head_dim`, unequal, no multiple of 8)
    are not supported, or None if they are.
    """
    if call.q.dtype not in (torch.float16, torch.bfloat16):
        return f"dtype {call.q.dtype} is neither fp16 nor bf16"
    dim, of_values = call.q.shape[-1], call.v.shape[-1]
    if dim != of_values:
        return f"head dim {dim} of queries and {of_values} of values differ"
    if dim > max_head_dim or dim % 8:
        return f"head dim {dim} is not a multiple of 8 up to {max_head_dim}"
    return None


def _is_installed(module: str) -> bool:
    if module in sys.modules:
        return True
    parts, found = module.split("."), None
    for depth in range(1, len(parts) + 1):
        name = ".".join(parts[:depth])
        # importlib.util.find_spec() would import the package to look inside it.
        found = PathFinder.find_spec(name, None if found is None else found.submodule_search_locations)
        if found is None:
            return False
    return True


def _function_refusal(module: str, name: str, arguments: tuple[str, ...]) -> str | None:
    try:
        _functions[module, name] = getattr(importlib.import_module(module), name)
    except (ImportError, OSError, AttributeError, RuntimeError) as error:
        return f"{module}.{name} cannot be imported: {type(error).__name__}: {error}"
    known = inspect.signature(_functions[module, name]).parameters
    takes_any = any(parameter.kind is inspect.Parameter.VAR_KEYWORD for parameter in known.values())
    unknown = [] if takes_any else [argument for argument in arguments if argument not in known]
    return f"{module}.{name} of this version takes no {', '.join(unknown)}" if unknown else None
