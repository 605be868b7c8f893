"""The types of a call's arguments, and the check of values against them before anything runs.

The types are those of the pipeline's signature, the ranges those that its docstrings state; the JSON Schema of the call
(`diffsynth.runtime.schema`) has both, too. `Annotated[T, check]` adds a check of its own: `check(value)` raises
ValueError for a value that does not fit.
"""

from __future__ import annotations

import dataclasses
import inspect
import math
import threading
import types
import typing
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Annotated, Any, Literal, Union

import torch
from PIL import Image
from torch import Tensor

from diffsynth.core import device as devices
from diffsynth.core.data.color import check_levels
from diffsynth.errors import did_you_mean, shown
from diffsynth.runtime.schema.annotations import schema_of, type_of
from diffsynth.runtime.schema.documentation import documented, with_range
from diffsynth.runtime.schema.values import BOUNDS, bounds_text
from diffsynth.runtime.unit import Program

_PLAIN = {str: "text", bool: "True or False", int: "an integer", float: "a number", types.NoneType: "None"}

_OVER = 1.01
"""Largest magnitude of a pixel value in [-1, 1] that is not refused: float16 and a decoder round."""

_LARGEST = torch.finfo(torch.float32).max
"""Largest number that tensors of a call can hold."""


class _Unfit(Exception):
    """A value that does not fit a type; `is_type` is False if its type fits, and the value does not."""

    def __init__(self, reason: str = "", *, is_type: bool = True) -> None:
        super().__init__(reason)
        self.is_type = is_type


@dataclasses.dataclass(frozen=True)
class ArgumentType:
    """The values that an argument takes.

    Args:
        name: of the argument.
        kind: the type that it is annotated with; a text that cannot be evaluated fits every value.
        bounds: keyword of JSON Schema, such as "minimum" -> limit of a number.
        per_image: whether a list of such values is taken, too, one for each result.
    """

    name: str
    kind: Any
    bounds: Mapping[str, float] = dataclasses.field(default_factory=dict)
    per_image: bool = False

    def check(self, value: Any) -> None:
        """Raise an error unless the argument takes `value`; images are decoded, tensors on meta are not read.

        Raises:
            TypeError: another type, where the argument takes images, tensors, functions or other objects.
            ValueError: another type, where it takes texts, numbers and lists of them; a number out of range or not
                finite, a text that is not valid Unicode, an empty list, an image that cannot be read.
        """
        try:
            _check(self.kind, value, self.bounds)
        except _Unfit as error:
            # A list of texts is one of an entry for each result already, so that a list of lists is none.
            is_listed = _is_plain(self.kind) and _takes_list(self.kind)
            if self.per_image and not is_listed and isinstance(value, list | tuple) and value:
                for entry in value:
                    self._check_entry(entry)
                return
            raise self._error(value, error) from error.__cause__

    def _check_entry(self, entry: Any) -> None:
        try:
            _check(self.kind, entry, self.bounds)
        except _Unfit as error:
            raise self._error(entry, error) from error.__cause__

    def _error(self, value: Any, error: _Unfit) -> ValueError | TypeError:
        reason = f" ({error})" if str(error) else ""
        range_text = bounds_text(self.bounds)
        expected = expected_text(self.kind) + (f", {range_text}" if range_text else "")
        text = f"{self.name}={shown(value)}: expected {expected}{reason}{_hint(self.kind, value)}"
        return TypeError(text) if error.is_type and not _is_plain(self.kind) else ValueError(text)


def argument_types(
    cls: type, program: Program, signature: inspect.Signature, per_image: Iterable[str]
) -> dict[str, ArgumentType]:
    """Return a dict argument -> `ArgumentType` of a pipeline's call.

    Args:
        cls: the pipeline class, whose docstrings state the ranges.
        program: its units.
        signature: of the call.
        per_image: names of the arguments that take a list of one value for each result, too.
    """
    texts, several = documented(cls, program), set(per_image)
    found = {}
    for name, parameter in signature.parameters.items():
        kind = type_of(parameter, program)
        schema = with_range(schema_of(kind) or {}, texts.get(name, ""))
        numbers = (one for one in schema.get("anyOf", [schema]) if one.get("type") in ("integer", "number"))
        bounds = {word: limit for one in numbers for word, limit in one.items() if word in BOUNDS}
        found[name] = ArgumentType(name, kind, bounds, name in several)
    return found


def check_rand_device(value: Any) -> None:
    """Raise ValueError unless random numbers can be generated on the device that `value` names."""
    devices.check_device(value)


RandDevice = Annotated[str | torch.device, check_rand_device]
"""The type of an argument that names the device on which noise is generated."""


def expected_text(kind: Any) -> str:
    """Return the values that fit a type, as text: "an integer or None"."""
    if kind in _PLAIN:
        return _PLAIN[kind]
    if kind is None:
        return "None"
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if origin in (Union, types.UnionType):
        return " or ".join(dict.fromkeys(map(expected_text, arguments)))
    if origin is Annotated:
        return expected_text(arguments[0])
    if origin is Literal:
        return f"one of {', '.join(map(str, arguments))}"
    if isinstance(origin, type) and issubclass(origin, Mapping):
        return "a dict"
    if origin is tuple and arguments[-1:] != (...,):
        return f"a tuple ({', '.join(map(expected_text, arguments))})"
    if isinstance(origin, type) and issubclass(origin, Iterable):
        return f"a list of {expected_text(arguments[0])}"
    if origin is not None and arguments and isinstance(arguments[0], list):
        return f"a function of {len(arguments[0])} argument{'s' if len(arguments[0]) != 1 else ''}"
    if kind is threading.Event:
        return "a threading.Event"
    if kind is Image.Image:
        return "a PIL image"
    if _tensor_class(kind) is not None:
        return "a tensor"
    return getattr(kind, "__name__", str(kind))


def _check(kind: Any, value: Any, bounds: Mapping[str, float]) -> None:
    """Raise _Unfit unless `value` is of the type `kind`, and within `bounds` if it is a number."""
    if kind is Any:
        return
    if kind is None:
        kind = types.NoneType
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if origin in (Union, types.UnionType):
        _check_union(arguments, value, bounds)
    elif origin is Annotated:
        _check(arguments[0], value, bounds)
        for extra in filter(callable, arguments[1:]):
            _check_extra(extra, value)
    elif origin is Literal:
        if not any(type(value) is type(one) and value == one for one in arguments):
            near = did_you_mean(value, map(str, arguments)) if isinstance(value, str) else ""
            raise _Unfit(near.removeprefix("; "), is_type=False)
    elif kind in _PLAIN:
        _check_plain(kind, value, bounds)
    elif origin is not None:
        _check_generic(origin, arguments, value)
    elif _tensor_class(kind) is not None:
        _check_tensor(value)
    elif isinstance(kind, type) and issubclass(kind, Image.Image):
        _check_image(value)
    elif kind is threading.Event:
        if not callable(getattr(value, "is_set", None)):  # one of multiprocessing is taken, too
            raise _Unfit
    elif isinstance(kind, type) and kind is not inspect.Parameter.empty:
        _check_class(kind, value)


def _check_union(kinds: Sequence[Any], value: Any, bounds: Mapping[str, float]) -> None:
    failed = []
    for kind in kinds:
        try:
            _check(kind, value, bounds)
        except _Unfit as error:
            failed.append(error)
            continue
        if isinstance(value, Tensor) and any(isinstance(one, type) and issubclass(one, Image.Image) for one in kinds):
            _check_pixels(value)
        return
    reasons = [str(error) for error in failed if str(error)]
    raise _Unfit("; ".join(dict.fromkeys(reasons)), is_type=all(error.is_type for error in failed))


def _check_extra(check: Callable[[Any], Any], value: Any) -> None:
    try:
        check(value)
    except ValueError as error:
        raise _Unfit(str(error), is_type=False) from None


def _check_plain(kind: type, value: Any, bounds: Mapping[str, float]) -> None:
    number = kind in (int, float)
    if not isinstance(value, (int, float) if kind is float else kind) or (number and isinstance(value, bool)):
        raise _Unfit
    if isinstance(value, str):
        try:
            value.encode()
        except UnicodeEncodeError as error:
            place = f"U+{ord(value[error.start]):04X} at position {error.start}"
            raise _Unfit(f"it has a lone surrogate, {place}, which is no character", is_type=False) from None
    if not number:
        return
    try:
        finite = math.isfinite(value)
    except OverflowError:  # an integer beyond the range of floats
        finite = kind is int
    if not finite:
        raise _Unfit(is_type=False)
    if kind is float and abs(value) > _LARGEST:
        raise _Unfit("it is beyond the range of float32", is_type=False)
    if not all(holds(value, bounds[word]) for word, (_, holds) in BOUNDS.items() if word in bounds):
        raise _Unfit(is_type=False)


def _check_generic(origin: Any, arguments: tuple[Any, ...], value: Any) -> None:
    if not isinstance(origin, type):
        return
    if issubclass(origin, Mapping):
        if not isinstance(value, Mapping):
            raise _Unfit
    elif issubclass(origin, tuple) and arguments[-1:] != (...,):
        if not isinstance(value, list | tuple) or len(value) != len(arguments):
            raise _Unfit
        for item, one in zip(arguments, value, strict=True):
            _check(item, one, {})
    elif issubclass(origin, Iterable):
        _check_items(arguments[0], value)
    elif arguments and isinstance(arguments[0], list):
        _check_function(value, len(arguments[0]))


def _check_items(item: Any, value: Any) -> None:
    if isinstance(value, str | bytes) or not isinstance(value, Sequence):
        raise _Unfit
    if _is_plain(item) and not isinstance(value, list | tuple):
        raise _Unfit
    if not len(value) and not dataclasses.is_dataclass(item):  # no settings, such as those of ControlNets, are none
        raise _Unfit("it is empty", is_type=False)
    # Another sequence, such as a video, may decode its items: one of them is enough.
    for index, one in enumerate(value if isinstance(value, list | tuple) else [value[0]]):
        try:
            _check(item, one, {})
        except _Unfit as error:
            reason = f": {error}" if str(error) else f", {shown(one)}, is {type(one).__name__}"
            raise _Unfit(f"entry {index}{reason}", is_type=error.is_type) from None


def _check_function(value: Any, count: int) -> None:
    if not callable(value):
        raise _Unfit
    try:
        signature = inspect.signature(value)
    except (TypeError, ValueError):
        return  # some functions of C have none
    try:
        signature.bind(*[None] * count)
    except TypeError as error:
        raise _Unfit(str(error)) from None


def _check_tensor(value: Any) -> None:
    if not isinstance(value, Tensor):
        raise _Unfit
    if value.is_floating_point() and not value.is_meta and not bool(torch.isfinite(value).all()):
        raise _Unfit("it has values that are not finite", is_type=False)


def _check_pixels(value: Tensor) -> None:
    """Raise _Unfit for a tensor in the place of images whose values are not in [-1, 1]."""
    if not value.is_floating_point():
        raise _Unfit(f"it is {value.dtype}; expected floating-point values in [-1, 1]", is_type=False)
    if not value.is_meta and value.numel() and float(value.detach().abs().amax()) > _OVER:
        low, high = (float(each) for each in value.detach().aminmax())
        raise _Unfit(f"its values are in [{low:.4g}, {high:.4g}]; expected [-1, 1]", is_type=False)


def _check_image(value: Any) -> None:
    if not isinstance(value, Image.Image):
        raise _Unfit
    if 0 in value.size:
        raise _Unfit(f"it has {value.width}x{value.height} pixels", is_type=False)
    try:
        value.load()  # an image that was opened from a file is read now, before anything runs
    except Exception as error:
        name = getattr(value, "filename", "")
        file = f"; its file is {name}" if name else ""
        raise _Unfit(f"it cannot be read: {error!s:.80}{file}", is_type=False) from error
    try:
        check_levels(value)
    except ValueError as error:
        raise _Unfit(str(error), is_type=False) from None


def _check_class(kind: type, value: Any) -> None:
    if not isinstance(value, kind):
        raise _Unfit
    if not dataclasses.is_dataclass(value) or isinstance(value, type):
        return
    hints = typing.get_type_hints(type(value))
    for field in dataclasses.fields(value):
        one = getattr(value, field.name)
        try:
            _check(hints[field.name], one, {})
        except _Unfit as error:
            reason = f" ({error})" if str(error) else ""
            text = f"{field.name}={shown(one)}: expected {expected_text(hints[field.name])}{reason}"
            raise _Unfit(text, is_type=error.is_type) from None


def _is_plain(kind: Any) -> bool:
    """Whether all values of a type are texts, numbers, bools, None, and lists of them."""
    if kind in _PLAIN or kind is None or typing.get_origin(kind) is Literal or kind is Ellipsis:
        return True
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if origin is Annotated:
        return True
    is_container = origin in (Union, types.UnionType) or (isinstance(origin, type) and issubclass(origin, Iterable))
    return is_container and all(map(_is_plain, arguments))


def _takes_list(kind: Any) -> bool:
    """Whether a type is that of a list, or a union with one."""
    origin = typing.get_origin(kind)
    if origin in (Union, types.UnionType):
        return any(map(_takes_list, typing.get_args(kind)))
    return isinstance(origin, type) and issubclass(origin, Iterable) and not issubclass(origin, Mapping)


def _hint(kind: Any, value: Any) -> str:
    """Return the next action for a value that is often given by mistake, as text with a leading "; ", or ""."""
    text = expected_text(kind)
    if "PIL image" not in text:
        return ""
    if isinstance(value, Image.Image):
        return "; pass a list of images"
    if type(value).__module__ == "numpy":
        return "; an array becomes an image by PIL.Image.fromarray"
    if not isinstance(value, str) and not hasattr(value, "__fspath__"):
        return ""
    takes_one = any(kind is Image.Image for kind in (kind, *typing.get_args(kind)))
    return "; open a file with PIL.Image.open(...)" if takes_one else "; open a file with VideoData(...)"


def _tensor_class(kind: Any) -> Any:
    """Return the tensor class that a type stands for, `Tensor` or one with a shape such as `Float[Tensor, "b c"]`; None
    for another type.
    """
    found = getattr(kind, "array_type", kind)
    return found if isinstance(found, type) and issubclass(found, Tensor) else None
