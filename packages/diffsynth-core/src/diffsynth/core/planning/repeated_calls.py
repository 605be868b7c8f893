"""Repeated calls of a rehearsal: of those that look alike the first is made, the others are counted as it was.

The look of tensors is their shape, stride, dtype and the size of their memory; that of other values is the value.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn

from diffsynth.core.planning.known_values import tensors_in

if TYPE_CHECKING:
    from diffsynth.core.planning.tracer import BlockTrace, MetaTracer


@dataclass(frozen=True)
class _Seen:
    """What a call did.

    Args:
        flops, visits: of its operations.
        peak: the most that was alive in it above what was before it, by place.
        result: the look of what it gave.
        changes: for each argument, the looks of attributes that came to look otherwise.
    """

    flops: int
    blocks_run: tuple[BlockTrace, ...]
    peak: Mapping[str, int]
    result: Any
    changes: tuple[Mapping[str, Any], ...]


class RepeatedCalls:
    """Makes calls for `diffsynth.core.repeats.repeated`.

    Args:
        rehearsal: that counts what is in them.
    """

    def __init__(self, tracer: MetaTracer) -> None:
        self._tracer = tracer
        self._seen: dict[Any, _Seen | None] = {}

    def __call__(self, function: Callable[..., Any], *arguments: Any) -> Any:
        """What the function gives; after the first call of a look, tensors that look like what that one gave."""
        key = self._key(function, arguments)
        if key is not None and key not in self._seen:
            return self._first(key, function, arguments)
        seen = None if key is None else self._seen[key]
        return function(*arguments) if seen is None else self._again(seen, arguments)

    def _key(self, function: Callable[..., Any], arguments: Sequence[Any]) -> Any:
        """Equal for calls that do the same; None where that cannot be told."""
        if not self._tracer.stages or torch.is_grad_enabled():  # a graph keeps tensors for its way back
            return None
        if self._is_known(None, arguments) or not _alone(None, arguments):
            return None
        try:
            return (function, *((type(each), _look(_contents(each))) for each in arguments))
        except _NoLook:
            return None

    def _is_known(self, result: Any, arguments: Sequence[Any]) -> bool:
        """Whether a value is known: what comes of it would not be known of a copy."""
        tensors = [tensor for each in (result, *arguments) for tensor in tensors_in(_contents(each))]
        return any(self._tracer.values.of(tensor) is not None for tensor in tensors)

    def _first(self, key: Any, function: Callable[..., Any], arguments: Sequence[Any]) -> Any:
        stage = self._tracer.stages[-1]
        flops, blocks_run = stage.flops, len(stage.blocks_run)
        with self._tracer.allocations.above() as peak:
            result = function(*arguments)
        did = (stage.flops - flops, tuple(stage.blocks_run[blocks_run:]), peak)
        self._seen[key] = None if self._is_known(result, arguments) else _seen(did, key, result, arguments)
        return result

    def _again(self, seen: _Seen, arguments: Sequence[Any]) -> Any:
        self._tracer.allocations.repeat(seen.peak)
        stage = self._tracer.stages[-1]
        stage.flops += seen.flops
        stage.blocks_run += seen.blocks_run
        for argument, changes in zip(arguments, seen.changes, strict=True):
            attributes = vars(argument) if changes else {}
            # All of the old go before the new come, as they did within the call.
            attributes.update(dict.fromkeys(changes))
            attributes.update({name: _made(look) for name, look in changes.items()})
        return _made(seen.result)


def _seen(
    did: tuple[int, tuple[BlockTrace, ...], Mapping[str, int]], key: Any, result: Any, arguments: Sequence[Any]
) -> _Seen | None:
    """What can be said of a call that was made; None if one like it cannot be counted alone."""
    try:
        changes = tuple(_changes(each, before) for each, (_, before) in zip(arguments, key[1:], strict=True))
        look = _look(result)
    except _NoLook:
        return None
    return _Seen(*did, look, changes) if _alone(result, arguments) else None


def _changes(argument: Any, before: Any) -> Mapping[str, Any]:
    """The looks of attributes that came to look otherwise.

    Raises:
        _NoLook: something else changed.
    """
    after = _look(_contents(argument))
    if after == before:
        return {}
    if not _has_attributes(argument):
        raise _NoLook
    old, new = dict(before.items), dict(after.items)
    if old.keys() - new.keys():
        raise _NoLook
    return {name: look for name, look in new.items() if name not in old or old[name] != look}


def _alone(result: Any, arguments: Sequence[Any]) -> bool:
    """Whether tensors of a result and of attributes have memory that no other argument and none of them shares."""
    given = [tensor for each in arguments if not _has_attributes(each) for tensor in tensors_in(each)]
    own = [tensor for each in arguments if _has_attributes(each) for tensor in tensors_in(vars(each))]
    own += tensors_in(result)
    storages = {id(tensor.untyped_storage()) for tensor in own}
    return len(storages) == len(own) and storages.isdisjoint(id(tensor.untyped_storage()) for tensor in given)


class _NoLook(Exception):
    """A value of which nobody can say whether another is like it."""


class _Tensor(NamedTuple):
    shape: tuple[int, ...]
    stride: tuple[int, ...]
    dtype: torch.dtype
    nbytes: int


class _Items(NamedTuple):
    kind: type
    items: tuple[Any, ...]


class _Plain(NamedTuple):
    # 1, 1.0 and True are equal.
    kind: type
    value: Any


def _look(value: Any) -> Any:
    """Hashable; `_made` makes another of the same look."""
    if isinstance(value, Tensor):
        if not value.is_meta or type(value) not in (Tensor, nn.Parameter):
            raise _NoLook
        return _Tensor(tuple(value.shape), value.stride(), value.dtype, value.untyped_storage().nbytes())
    if type(value) in (list, tuple):
        return _Items(type(value), tuple(map(_look, value)))
    if type(value) is dict:
        return _Items(dict, tuple((name, _look(each)) for name, each in value.items()))
    if value is None or isinstance(value, bool | int | float | str | torch.dtype | torch.device):
        return _Plain(type(value), value)
    raise _NoLook


def _made(look: Any) -> Any:
    if isinstance(look, _Plain):
        return look.value
    if isinstance(look, _Items):
        made = [(name, _made(each)) for name, each in look.items] if look.kind is dict else map(_made, look.items)
        return look.kind(made)
    whole = torch.empty(look.nbytes // look.dtype.itemsize, dtype=look.dtype, device="meta")
    return whole.as_strided(look.shape, look.stride)


def _contents(argument: Any) -> Any:
    return vars(argument) if _has_attributes(argument) else argument


def _has_attributes(argument: Any) -> bool:
    """Whether its attributes are all there is to an object; functions and containers may have some, too."""
    kind = type(argument)
    if not hasattr(argument, "__dict__") or isinstance(argument, nn.Module):
        return False
    is_bare = kind.__basicsize__ == _Bare.__basicsize__ and kind.__itemsize__ == 0
    return is_bare and not any(vars(each).get("__slots__") for each in kind.__mro__)


class _Bare:
    """An object with attributes and nothing else."""
