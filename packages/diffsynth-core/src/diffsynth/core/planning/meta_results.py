"""What operations give on meta, remembered: torch works most of it out in Python, and blocks repeat each other."""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor

from diffsynth.core.planning.known_values import tensors_in


class MetaResultCache:
    """Calls operations whose tensors are on meta; one that is called again with alike arguments is not called again."""

    def __init__(self) -> None:
        self._known: dict[Any, Any] = {}

    def __call__(self, func: Any, args: Any, kwargs: Any) -> Any:
        """What `func` gives: new tensors on meta of the right shape, stride and dtype."""
        key = _key((args, tuple(kwargs.items()))) if _makes_new_tensors(func) else None
        if key is None:
            return func(*args, **kwargs)
        key = (func, key)
        if key not in self._known:
            out = func(*args, **kwargs)
            if not _shares(out, (args, kwargs)):
                self._known[key] = _form(out)
            return out
        return _made(self._known[key])


@functools.cache
def _makes_new_tensors(func: Any) -> bool:
    """Whether it writes to no argument and gives nothing that shares memory with one."""
    schema = func._schema
    aliases = [each.alias_info for each in (*schema.arguments, *schema.returns)]
    return bool(schema.returns) and not any(aliases) and torch.Tag.nondeterministic_seeded not in func.tags


def _shares(out: Any, given: Any) -> bool:
    """Whether a result is a view of an argument after all: the schema of `_unsafe_view` keeps silent about it."""
    storages = {id(tensor.untyped_storage()) for tensor in tensors_in(given)}
    return any(id(tensor.untyped_storage()) in storages for tensor in tensors_in(out))


def _key(value: Any) -> Any:
    """Equal for arguments that give alike results; None if a tensor is not on meta, or something has no such key."""
    if isinstance(value, Tensor):
        if not value.is_meta or (type(value) is not Tensor and not isinstance(value, torch.nn.Parameter)):
            return None
        return (value.shape, value.stride(), value.dtype)
    if isinstance(value, list | tuple):
        keys = tuple(map(_key, value))
        return None if any(key is None for key in keys) else (type(value), keys)
    if value is None or isinstance(value, bool | int | float | str | torch.dtype | torch.device | torch.layout):
        # 1, 1.0 and True are equal, and give other dtypes.
        return (type(value), value)
    return (type(value), value) if isinstance(value, torch.memory_format) else None


def _form(out: Any) -> Any:
    if isinstance(out, Tensor):
        return (out.shape, out.stride(), out.dtype, out.device)
    return [_form(each) for each in out] if isinstance(out, list | tuple) else out


def _made(form: Any) -> Any:
    if isinstance(form, tuple):
        shape, stride, dtype, device = form
        return torch.empty_strided(shape, stride, dtype=dtype, device=device)
    return tuple(_made(each) for each in form) if isinstance(form, list) else form
