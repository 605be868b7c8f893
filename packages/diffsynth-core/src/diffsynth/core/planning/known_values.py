"""What small tensors on the meta device would hold, as far as it follows from constants."""

from __future__ import annotations

import weakref
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map_only
from torch.utils.weak import WeakTensorKeyDictionary

LIMIT = 2**20
"""Elements up to which a value is worth knowing: lengths, masks and positions are, activations are not."""

_UNFILLED = ("aten::empty", "aten::new_empty", "aten::_empty")


def tensors_in(*values: Any) -> list[Tensor]:
    """The tensors among arguments or results of an operation, which nest no deeper than lists; faster than a pytree."""
    found: list[Tensor] = []
    for value in values:
        if isinstance(value, Tensor):
            found.append(value)
        elif isinstance(value, list | tuple):
            found += tensors_in(*value)
        elif isinstance(value, dict):
            found += tensors_in(*value.values())
    return found


class KnownValues:
    """Tensor on the meta device -> a twin on the CPU that holds its value.

    An operation whose inputs are all known is done on the twins, too. Views of twins are twins of views, so what is
    written in place is seen by all of them. Writing something unknown makes a storage unknown for good.
    """

    def __init__(self) -> None:
        self._twins = WeakTensorKeyDictionary()
        self._spoilt: dict[int, weakref.ref[object]] = {}

    def of(self, tensor: Tensor) -> Tensor | None:
        """The value of a tensor, on the CPU; None if it is not known."""
        twin = self._twins.get(tensor) if tensor.is_meta else tensor
        if twin is None or id(twin.untyped_storage()) in self._spoilt:
            return None
        return twin

    def follow(self, func: Any, args: Sequence[Any], kwargs: Mapping[str, Any], out: Any) -> None:
        """Learn what an operation on the meta device gave.

        Args:
            func: of `torch.ops.aten`.
            args, kwargs: what it was given.
            out: what it returned.
        """
        results = tensors_in(out)
        if not any(result.is_meta for result in results):
            return
        known = None if any(result.numel() > LIMIT for result in results) else self.arguments(args, kwargs)
        if known is None or _is_open(func):
            self.spoil(func, args, kwargs)
            return
        twins = tensors_in(func(*known[0], **known[1]))
        for result, twin in zip(results, twins, strict=True):
            if result.is_meta and result not in self._twins:
                self._twins[result] = twin

    def arguments(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> tuple[Any, dict[str, Any]] | None:
        """The arguments with known values in place of tensors, to be computed on the CPU; None if one is not known."""
        tensors = tensors_in(args, kwargs)
        if any(tensor.numel() > LIMIT or self.of(tensor) is None for tensor in tensors):
            return None
        on_cpu = tree_map_only(Tensor, self.of, (tuple(args), dict(kwargs)))
        if "device" in on_cpu[1]:
            on_cpu[1]["device"] = torch.device("cpu")
        return on_cpu

    def learn(self, tensor: Tensor, twin: Tensor) -> None:
        """Say what a tensor on the meta device holds."""
        self._twins[tensor] = twin

    def spoil(self, func: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> None:
        """What the operation writes to is unknown from now on."""
        if not func._schema.is_mutable:
            return
        for argument, value in zip(func._schema.arguments, args, strict=False):
            self._spoil(argument, value)
        for argument in func._schema.arguments:
            self._spoil(argument, kwargs.get(argument.name))

    def _spoil(self, argument: Any, value: Any) -> None:
        if argument.alias_info is None or not argument.alias_info.is_write:
            return
        for tensor in tensors_in(value):
            twin = self._twins.get(tensor) if tensor.is_meta else tensor
            if twin is not None:
                storage = twin.untyped_storage()
                key = id(storage)
                self._spoilt[key] = weakref.ref(storage, lambda _, key=key: self._spoilt.pop(key, None))


def _is_open(func: Any) -> bool:
    """Whether its result does not follow from its arguments."""
    return torch.Tag.nondeterministic_seeded in func.tags or func._schema.name.startswith(_UNFILLED)
