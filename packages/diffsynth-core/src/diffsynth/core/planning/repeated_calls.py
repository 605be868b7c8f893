"""Repeated calls in a traced run: of calls with arguments of the same form one is made, the others are counted.

The form of a tensor is its shape, stride, dtype and the size of its memory; the form of any other value is the value.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from diffsynth.core.planning.allocations import AllocationTracker
from diffsynth.core.planning.meta_results import KnownValues, tensors_in
from diffsynth.core.planning.workload import BlockCall, StageTrace


@dataclass(frozen=True)
class _Effects:
    """Recorded effects of a call.

    Args:
        flops: floating-point operations of the call.
        block_calls: calls of blocks within it.
        peak_above: peak of live bytes above what was live before it, by memory.
        result: form of its result.
        changes: for each argument, the forms of attributes whose form changed.
    """

    flops: int
    block_calls: tuple[BlockCall, ...]
    peak_above: Mapping[str, int]
    result: Any
    changes: tuple[Mapping[str, Any], ...]


class RepeatedCalls:
    """Makes the calls of `diffsynth.core.repeats.repeated` during a traced run.

    Args:
        stages: traces of the stages so far; what a call does is added to the last one.
        allocations: counts the memory of the call.
        values: knows the values of small tensors.
    """

    def __init__(self, stages: Sequence[StageTrace], allocations: AllocationTracker, values: KnownValues) -> None:
        self._stages, self._allocations, self._values = stages, allocations, values
        self._effects: dict[Any, _Effects | None] = {}

    def __call__(self, function: Callable[..., Any], *arguments: Any) -> Any:
        """Return the result of `function(*arguments)`; if a call of the same form was recorded, do not call it, but add
        its effects to the counts and return new meta tensors of the form of its result.
        """
        key = self._key(function, arguments)
        if key is not None and key not in self._effects:
            return self._first(key, function, arguments)
        effects = None if key is None else self._effects[key]
        return function(*arguments) if effects is None else self._repeat(effects, arguments)

    def _key(self, function: Callable[..., Any], arguments: Sequence[Any]) -> Any:
        """Return a hashable key of a call of `function`, equal for calls that have the same effects; None if that
        cannot be known, outside of a stage and while gradients are enabled.
        """
        if not self._stages or torch.is_grad_enabled():  # the graph of autograd keeps tensors of the call alive
            return None
        if self._has_known_values(None, arguments) or not _has_own_memory(None, arguments):
            return None
        try:
            return (function, *((type(each), _form(_contents(each))) for each in arguments))
        except _NoFormError:
            return None

    def _has_known_values(self, result: Any, arguments: Sequence[Any]) -> bool:
        # New tensors of the same form have no known values, so a call whose values matter is always made.
        tensors = [tensor for each in (result, *arguments) for tensor in tensors_in(_contents(each))]
        return any(self._values.value_of(tensor) is not None for tensor in tensors)

    def _first(self, key: Any, function: Callable[..., Any], arguments: Sequence[Any]) -> Any:
        stage = self._stages[-1]
        flops, count = stage.flops, len(stage.block_calls)
        with self._allocations.peak_above() as peak_above:
            result = function(*arguments)
        self._effects[key] = None
        if self._has_known_values(result, arguments) or not _has_own_memory(result, arguments):
            return result
        try:
            changes = tuple(_changes(each, before) for each, (_, before) in zip(arguments, key[1:], strict=True))
            form = _form(result)
        except _NoFormError:
            return result
        block_calls = tuple(stage.block_calls[count:])
        self._effects[key] = _Effects(stage.flops - flops, block_calls, peak_above, form, changes)
        return result

    def _repeat(self, effects: _Effects, arguments: Sequence[Any]) -> Any:
        self._allocations.repeat(effects.peak_above)
        stage = self._stages[-1]
        stage.flops += effects.flops
        stage.block_calls += effects.block_calls
        for argument, changes in zip(arguments, effects.changes, strict=True):
            attributes = vars(argument) if changes else {}
            # All old values are freed before the new ones are made, as they were within the call.
            attributes.update(dict.fromkeys(changes))
            attributes.update({name: _made(form) for name, form in changes.items()})
        return _made(effects.result)


def _changes(argument: Any, before: Any) -> Mapping[str, Any]:
    """Return a mapping attribute name -> new form (shape, dtype and so on, or the value), for the attributes of
    `argument` that a call added or changed in form.

    Raises:
        _NoFormError: the call changed something else.
    """
    after = _form(_contents(argument))
    if after == before:
        return {}
    if not _has_attributes_alone(argument):
        raise _NoFormError
    old, new = dict(before.items), dict(after.items)
    if old.keys() - new.keys():
        raise _NoFormError
    return {name: form for name, form in new.items() if name not in old or old[name] != form}


def _has_own_memory(result: Any, arguments: Sequence[Any]) -> bool:
    """Whether each tensor of `result` and of the attributes of `arguments` shares its memory with no other tensor of
    the call.
    """
    given = [tensor for each in arguments if not _has_attributes_alone(each) for tensor in tensors_in(each)]
    own = [tensor for each in arguments if _has_attributes_alone(each) for tensor in tensors_in(vars(each))]
    own += tensors_in(result)
    storages = {id(tensor.untyped_storage()) for tensor in own}
    return len(storages) == len(own) and storages.isdisjoint(id(tensor.untyped_storage()) for tensor in given)


class _NoFormError(Exception):
    """A value has no form: whether another value is like it cannot be known."""


class _TensorForm(NamedTuple):
    shape: tuple[int, ...]
    stride: tuple[int, ...]
    dtype: torch.dtype
    nbytes: int


class _ContainerForm(NamedTuple):
    kind: type
    items: tuple[Any, ...]


class _ValueForm(NamedTuple):
    # 1, 1.0 and True are equal, so the type is part of the form.
    kind: type
    value: Any


def _form(value: Any) -> Any:
    """Return the form of `value`, a hashable tuple: shape, stride, dtype and bytes of a tensor, type and forms of the
    items of a container, else type and value.

    `_made` returns a new value of a form.

    Raises:
        _NoFormError: the value is of another kind.
    """
    if isinstance(value, Tensor):
        if not value.is_meta or type(value) not in (Tensor, nn.Parameter):
            raise _NoFormError
        return _TensorForm(tuple(value.shape), value.stride(), value.dtype, value.untyped_storage().nbytes())
    if type(value) in (list, tuple):
        return _ContainerForm(type(value), tuple(map(_form, value)))
    if type(value) is dict:
        return _ContainerForm(dict, tuple((name, _form(each)) for name, each in value.items()))
    if value is None or isinstance(value, bool | int | float | str | torch.dtype | torch.device):
        return _ValueForm(type(value), value)
    raise _NoFormError


def _made(form: Any) -> Any:
    if isinstance(form, _ValueForm):
        return form.value
    if isinstance(form, _ContainerForm):
        made = [(name, _made(each)) for name, each in form.items] if form.kind is dict else map(_made, form.items)
        return form.kind(made)
    whole = torch.empty(form.nbytes // form.dtype.itemsize, dtype=form.dtype, device="meta")
    return whole.as_strided(form.shape, form.stride)


def _contents(argument: Any) -> Any:
    return vars(argument) if _has_attributes_alone(argument) else argument


def _has_attributes_alone(argument: Any) -> bool:
    """Whether an object's state is its attributes alone; False for functions, containers, modules and objects with
    slots.
    """
    kind = type(argument)
    if not hasattr(argument, "__dict__") or isinstance(argument, nn.Module):
        return False
    is_bare = kind.__basicsize__ == _Bare.__basicsize__ and kind.__itemsize__ == 0
    return is_bare and not any(vars(each).get("__slots__") for each in kind.__mro__)


class _Bare:
    """An object with attributes and nothing else."""
