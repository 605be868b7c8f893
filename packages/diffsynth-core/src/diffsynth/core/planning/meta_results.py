"""Results of operations on the meta device: their shapes, remembered, and the values of small tensors."""

from __future__ import annotations

import functools
import weakref
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map_only
from torch.utils.weak import WeakTensorKeyDictionary

MAX_KNOWN = 2**20
"""Elements up to which values are tracked: lengths, masks and positions are this small, activations are not."""

_UNFILLED = ("aten::empty", "aten::new_empty", "aten::_empty")


def tensors_in(*values: Any) -> list[Tensor]:
    """Return a list of all tensors in `values`, in order; lists, tuples and dicts are searched at any depth, other
    objects are not.

    Faster than `torch.utils._pytree`, and called for each operation.
    """
    found: list[Tensor] = []
    for value in values:
        if isinstance(value, Tensor):
            found.append(value)
        elif isinstance(value, list | tuple):
            found += tensors_in(*value)
        elif isinstance(value, dict):
            found += tensors_in(*value.values())
    return found


class MetaResultCache:
    """Calls operations on meta tensors, and returns a remembered result for arguments of the same shapes and values;
    results on the CPU are not remembered.

    torch works out most shapes in Python, and the blocks of a network repeat each other.
    """

    def __init__(self) -> None:
        self._known: dict[Any, Any] = {}

    def __call__(self, func: Any, args: Any, kwargs: Any) -> Any:
        """Return the result of operation `func` on `args` and `kwargs`; if it was called before with tensors of the
        same shapes and dtypes and equal other values, new, unfilled tensors like that result.
        """
        key = _key((args, tuple(kwargs.items()))) if _makes_new_tensors(func) else None
        if key is None:
            return func(*args, **kwargs)
        key = (func, key)
        if key not in self._known:
            out = func(*args, **kwargs)
            # The schema of some operations, such as `_unsafe_view`, does not declare that they return a view.
            storages = {id(tensor.untyped_storage()) for tensor in tensors_in(args, kwargs)}
            # A tensor that is made on the CPU, such as positions, has values that later operations may read.
            if all(tensor.is_meta and id(tensor.untyped_storage()) not in storages for tensor in tensors_in(out)):
                self._known[key] = _description(out)
            return out
        return _made(self._known[key])


@functools.cache
def _makes_new_tensors(func: Any) -> bool:
    """Whether an operation returns something, declares no view of an argument and no write to one, and is not
    random.
    """
    schema = func._schema
    aliases = [each.alias_info for each in (*schema.arguments, *schema.returns)]
    return bool(schema.returns) and not any(aliases) and torch.Tag.nondeterministic_seeded not in func.tags


def _key(value: Any) -> Any:
    """Return a hashable key of an operation's arguments: those with equal keys have results of equal shapes and dtypes;
    None if one is a tensor with data or of an unknown type.
    """
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


def _description(out: Any) -> Any:
    """Return a description of `out`, an operation's result: a (shape, stride, dtype, device) tuple for a tensor, a list
    for a sequence, else the value itself.
    """
    if isinstance(out, Tensor):
        return (out.shape, out.stride(), out.dtype, out.device)
    return [_description(each) for each in out] if isinstance(out, list | tuple) else out


def _made(description: Any) -> Any:
    """Return a result as `description`, from `_description`, says: new, unfilled tensors, tuples for sequences, else
    the value itself.
    """
    if isinstance(description, tuple):
        shape, stride, dtype, device = description
        return torch.empty_strided(shape, stride, dtype=dtype, device=device)
    return tuple(_made(each) for each in description) if isinstance(description, list) else description


class KnownValues:
    """Values of small tensors on the meta device, as far as they follow from constants.

    Each known tensor has a copy on the CPU that holds its values. An operation whose inputs are all known is run on
    the copies, too. Views of tensors have views of copies, so a write in place is seen by all of them. A write of
    something unknown makes a storage unknown for good.
    """

    def __init__(self) -> None:
        self._copies: Any = WeakTensorKeyDictionary()
        self._invalid: dict[int, weakref.ref[object]] = {}

    def value_of(self, tensor: Tensor) -> Tensor | None:
        """Return a CPU tensor with the values of `tensor`, or `tensor` itself if it is not on meta; None if the values
        are unknown.
        """
        copy: Tensor | None = self._copies.get(tensor) if tensor.is_meta else tensor
        if copy is None or id(copy.untyped_storage()) in self._invalid:
            return None
        return copy

    def set_value(self, tensor: Tensor, value: Tensor) -> None:
        """Keep `value`, a CPU tensor, as the known values of `tensor`, which is on the meta device."""
        self._copies[tensor] = value

    def record(self, func: Any, args: Sequence[Any], kwargs: Mapping[str, Any], out: Any) -> None:
        """Keep the values of `out`, an operation's results on meta, if all inputs are known; else mark the tensors that
        it writes to as unknown.

        Results that are random, unfilled or larger than `MAX_KNOWN` are not kept.

        Args:
            func: the operation, of `torch.ops.aten`.
            args: its positional arguments.
            kwargs: its keyword arguments.
            out: its result.
        """
        results = tensors_in(out)
        if not any(result.is_meta for result in results):
            return
        known = None if any(result.numel() > MAX_KNOWN for result in results) else self.on_cpu(args, kwargs)
        if known is None or _is_arbitrary(func):
            self.invalidate_written(func, args, kwargs)
            return
        copies = tensors_in(func(*known[0], **known[1]))
        for result, copy in zip(results, copies, strict=True):
            if result.is_meta and result not in self._copies:
                self._copies[result] = copy

    def on_cpu(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> tuple[Any, dict[str, Any]] | None:
        """Return a pair `(args, kwargs)`, a tuple and a dict, with CPU tensors of the same values for those on meta;
        None if a value is not known or a tensor has more than `MAX_KNOWN` elements.

        Returns:
            Positional and keyword arguments; None if a value is not known.
        """
        tensors = tensors_in(args, kwargs)
        if any(tensor.numel() > MAX_KNOWN or self.value_of(tensor) is None for tensor in tensors):
            return None
        known_args, known_kwargs = tree_map_only(Tensor, self.value_of, (tuple(args), dict(kwargs)))
        if "device" in known_kwargs:
            known_kwargs["device"] = torch.device("cpu")
        return known_args, known_kwargs

    def invalidate_written(self, func: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> None:
        """Mark the values of the arguments that operation `func` writes to as unknown, for good."""
        if not func._schema.is_mutable:
            return
        for argument, value in zip(func._schema.arguments, args, strict=False):
            self._invalidate(argument, value)
        for argument in func._schema.arguments:
            self._invalidate(argument, kwargs.get(argument.name))

    def _invalidate(self, argument: Any, value: Any) -> None:
        if argument.alias_info is None or not argument.alias_info.is_write:
            return
        for tensor in tensors_in(value):
            copy = self._copies.get(tensor) if tensor.is_meta else tensor
            if copy is not None:
                storage = copy.untyped_storage()
                key = id(storage)
                # A later storage may have the same id, so the entry goes with the storage.
                self._invalid[key] = weakref.ref(storage, functools.partial(self._forget, key))

    def _forget(self, key: int, _: object) -> None:
        self._invalid.pop(key, None)


def _is_arbitrary(func: Any) -> bool:
    """Whether an operation returns random values or unfilled memory, which do not follow from its arguments."""
    return torch.Tag.nondeterministic_seeded in func.tags or func._schema.name.startswith(_UNFILLED)
