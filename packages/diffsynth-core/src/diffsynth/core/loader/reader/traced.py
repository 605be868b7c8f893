"""Tracing a converter function on tensors without values, so that what it does becomes a plan.

A file whose names are mapped by a user's function can then be read tensor by tensor, as with declared rules.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

from diffsynth.core.loader import convert
from diffsynth.core.loader.header import Header
from diffsynth.core.loader.reader.source import stored_dtype
from diffsynth.errors import KeyMismatch

Converter = Callable[[dict[str, Any]], Any]
"""A function from a file's tensors, by name, to a module's. A class is first called without arguments."""


def called(converter: Any, state_dict: dict[str, Any]) -> Any:
    """Return `converter(state_dict)`, or `converter()(state_dict)` if `converter` is a class."""
    return (converter() if inspect.isclass(converter) else converter)(state_dict)


def trace(converter: Any, header: Header) -> tuple[dict[str, convert.Target], dict[str, torch.dtype]]:
    """Return a tuple of two dicts for the tensors that a converter makes of a file, name -> `Target` (sources and rule)
    and name -> dtype; raise ValueError if it needs values.

    The converter is called on fake tensors, which have names, shapes and dtypes but no values. It may rename, cut,
    join, reshape, convert and compute.

    Args:
        converter: see `Converter`.
        header: the file's header.

    Returns:
        Name -> target, and name -> dtype.

    Raises:
        ValueError: the converter reads values, generates random ones, writes into a tensor, or returns anything but a
            dict of tensors.
        KeyMismatch: the converter reads a name that the file does not have.
    """
    recorder = _Recorder()
    with FakeTensorMode(allow_non_fake_inputs=True), torch.no_grad():
        fakes = {key: torch.empty(info.shape, dtype=stored_dtype(header, key)) for key, info in header.tensors.items()}
        recorder.begin(fakes.values())
        try:
            with recorder:
                made = called(converter, _nested_as_in_file(header, fakes))
        except KeyError as error:
            raise KeyMismatch(
                f"{header.where} has no {error.args[0]!r}, which the state_dict_converter wants"
            ) from error
        except (RuntimeError, NotImplementedError, TypeError) as error:
            raise ValueError(
                f"the state_dict_converter cannot be traced for {header.where}: {str(error).splitlines()[0]}. "
                "Names, shapes and dtypes are known then, values are not. Convert the file once, or load it into memory"
            ) from error
    if not isinstance(made, Mapping) or not all(isinstance(value, Tensor) for value in made.values()):
        raise ValueError(f"the state_dict_converter gave {_kind(made)}; expected a dict of tensors")
    names = {id(fake): key for key, fake in fakes.items()}
    targets = {
        key: _renamed(key, names[id(tensor)], tensor) if id(tensor) in names else recorder.target(key, tensor, fakes)
        for key, tensor in made.items()
    }
    return targets, {key: tensor.dtype for key, tensor in made.items()}


def _nested_as_in_file(header: Header, tensors: Mapping[str, Tensor]) -> dict[str, Any]:
    """Return `tensors` as a dict key -> tensor, with dicts in it where the file, a pickle, has nested dicts."""

    def filled(shapes: Mapping[str, Any], prefix: str) -> dict[str, Any]:
        return {
            key: filled(inside, f"{prefix}{key}.") if isinstance(inside, Mapping) else tensors[prefix + key]
            for key, inside in shapes.items()
        }

    return dict(tensors) if header.nested is None else filled(header.nested, "")


def _kind(made: Any) -> str:
    if not isinstance(made, Mapping):
        return f"a {type(made).__name__}"
    key, value = next((key, value) for key, value in made.items() if not isinstance(value, Tensor))
    return f"a {type(value).__name__} for {key!r}"


def _renamed(key: str, source: str, tensor: Tensor) -> convert.Target:
    return convert.Target(convert.Rename(source, key), (source,), 0, tuple(tensor.shape))


@dataclass(frozen=True)
class _Value:
    """A placeholder for a tensor in the arguments of a recorded operation."""

    number: int


@dataclass(frozen=True)
class _Step:
    """One recorded operation.

    Args:
        operation: the torch operation.
        args, kwargs: its arguments, with a `_Value` for each recorded tensor.
        needs: numbers of the tensors that it reads.
        gives: numbers of its results, in order.
    """

    operation: Callable[..., Any]
    args: Any
    kwargs: Any
    needs: frozenset[int]
    gives: tuple[int, ...]


class _Recorder(TorchDispatchMode):
    """A dispatch mode that records every operation on tensors."""

    def __init__(self) -> None:
        super().__init__()
        self._steps: list[_Step] = []
        self._numbers: dict[int, int] = {}
        # Keeps every tensor alive: the id of a freed tensor may be given to another one.
        self._seen: list[Tensor] = []

    def begin(self, tensors: Any) -> None:
        """Give a number to each of `tensors`, which exist before the first recorded operation."""
        for tensor in tensors:
            self._number(tensor)

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func._schema.is_mutable:
            raise TypeError(f"it writes into a tensor ({func}); make a new one")
        if torch.Tag.nondeterministic_seeded in func.tags:
            raise TypeError(f"it generates random values ({func})")
        arguments = tree_map(self._placeholder, (args, kwargs))
        made = func(*args, **kwargs)
        needs = frozenset(value.number for value in tree_leaves(arguments) if isinstance(value, _Value))
        gives = tuple(self._number(value) for value in tree_leaves(made) if isinstance(value, Tensor))
        self._steps.append(_Step(func, *arguments, needs, gives))
        return made

    def target(self, key: str, tensor: Tensor, fakes: Mapping[str, Tensor]) -> convert.Target:
        """Return the `Target` of a computed tensor: its sources, its shape, and a rule that repeats the recorded
        operations.
        """
        wanted = {self._numbers[id(tensor)]} if id(tensor) in self._numbers else set()
        steps = []
        for step in reversed(self._steps):
            if wanted.intersection(step.gives):
                steps.append(step)
                wanted |= step.needs
        numbers = {self._numbers[id(fake)]: name for name, fake in fakes.items()}
        inputs = tuple(number for number in numbers if number in wanted)
        result = self._numbers[id(tensor)] if steps else tensor
        sources = tuple(numbers[number] for number in inputs)
        shape = tuple(tensor.shape)
        rule = convert.Apply(_Replay(tuple(reversed(steps)), inputs, result), sources, key, lambda *_: shape)
        return convert.Target(rule, sources, 0, shape)

    def _number(self, tensor: Tensor) -> int:
        if id(tensor) not in self._numbers:
            self._seen.append(tensor)
            self._numbers[id(tensor)] = len(self._seen)
        return self._numbers[id(tensor)]

    def _placeholder(self, value: Any) -> Any:
        return _Value(self._numbers[id(value)]) if id(value) in self._numbers else value


@dataclass(frozen=True)
class _Replay:
    """Recorded operations as a function of real tensors.

    Args:
        steps: the operations, in order.
        inputs: numbers of the tensors that the function is called with.
        result: number of the tensor that it returns; a tensor if the result depends on no input.
    """

    steps: tuple[_Step, ...]
    inputs: tuple[int, ...]
    result: int | Tensor

    def __call__(self, *sources: Tensor) -> Tensor:
        if isinstance(self.result, Tensor):
            return self.result
        values = dict(zip(self.inputs, sources, strict=True))

        def value(argument: Any) -> Any:
            return values[argument.number] if isinstance(argument, _Value) else argument

        for step in self.steps:
            args, kwargs = tree_map(value, (step.args, step.kwargs))
            made = [each for each in tree_leaves(step.operation(*args, **kwargs)) if isinstance(each, Tensor)]
            values.update(zip(step.gives, made, strict=True))
        return values[self.result]
