"""Checks of arguments of functions and fields of dataclasses: numbers, tensors and functions.

No torch. The arguments of a pipeline's call are checked by their annotations: `diffsynth.runtime.argument_types`.
"""

from __future__ import annotations

import math
import numbers
import sys
from typing import Any

from diffsynth.errors import shown


def check_number(
    name: str,
    value: Any,
    *,
    least: float | None = None,
    above: float | None = None,
    most: float | None = None,
    below: float | None = None,
    note: str = "",
) -> Any:
    """Raise ValueError unless an argument is a finite number in a range; return it unchanged.

    Numbers of NumPy are numbers; True, False, texts and tensors are not.

    Args:
        name: of the argument, for the message.
        value: as the caller gave it.
        least, above: the lower limit, itself included or not; None is none.
        most, below: the upper limit, itself included or not; None is none.
        note: end of the message, such as "1.0 is no shift".

    Raises:
        ValueError: anything else, with what is expected.
    """
    is_number = isinstance(value, numbers.Real) and not isinstance(value, bool)
    if not is_number or not _is_finite(value) or not _is_within(value, least, above, most, below):
        is_bounded = (least, above) != (None, None) and (most, below) != (None, None)
        expected = f"a {'' if is_bounded else 'finite '}number{_range_text(least, above, most, below)}"
        raise ValueError(f"{name}={shown(value)}: expected {expected}{f'; {note}' if note else ''}")
    return value


def check_integer(name: str, value: Any, *, least: int | None = None, most: int | None = None, note: str = "") -> Any:
    """Raise ValueError unless an argument is an integer in a range; return it unchanged.

    Integers of NumPy are integers; True, False, floats and texts are not.

    Args:
        name: of the argument, for the message.
        value: as the caller gave it.
        least: the lower limit, itself included; None is none.
        most: the upper limit, itself included; None is none.
        note: end of the message.

    Raises:
        ValueError: anything else, with what is expected.
    """
    is_integer = isinstance(value, numbers.Integral) and not isinstance(value, bool)
    if not is_integer or not _is_within(value, least, None, most, None):
        expected = f"an integer{_range_text(least, None, most, None)}"
        raise ValueError(f"{name}={shown(value)}: expected {expected}{f'; {note}' if note else ''}")
    return value


def check_tensors(**tensors: Any) -> None:
    """Raise TypeError unless each argument is a floating-point tensor.

    Args:
        tensors: name of an argument -> its value.

    Raises:
        TypeError: a list, an array, a number or a tensor of integers; the message says how to make a tensor of it.
    """
    torch = sys.modules.get("torch")  # without it nothing is a tensor
    for name, value in tensors.items():
        if torch is None or not isinstance(value, torch.Tensor):
            kind = type(value).__name__
            listed = isinstance(value, list | tuple | float | int)
            how = f"; torch.tensor({name})" if listed else f"; torch.from_numpy({name})" if kind == "ndarray" else ""
            raise TypeError(f"{name} is {shown(value)}, of type {kind}; expected a floating-point tensor{how}")
        if not value.is_floating_point():
            raise TypeError(f"{name} is a tensor of {value.dtype}; expected floating-point values: {name}.float()")


def check_functions(**functions: Any) -> None:
    """Raise TypeError unless each argument can be called.

    Args:
        functions: name of an argument -> its value.

    Raises:
        TypeError: another object.
    """
    for name, value in functions.items():
        if not callable(value):
            raise TypeError(f"{name}={shown(value)}: expected a function")


def _is_finite(value: Any) -> bool:
    try:
        return math.isfinite(value)
    except OverflowError:  # an integer beyond the range of floats
        return False


def _is_within(value: Any, least: float | None, above: float | None, most: float | None, below: float | None) -> bool:
    return (
        (least is None or value >= least)
        and (above is None or value > above)
        and (most is None or value <= most)
        and (below is None or value < below)
    )


def _range_text(least: float | None, above: float | None, most: float | None, below: float | None) -> str:
    """Return the limits as text, " of at least 0"; "" without any."""
    if least is not None and most is not None:
        return f" from {least} to {most}"
    if above is not None and below is not None:
        return f" between {above} and {below}"
    low = f"of at least {least}" if least is not None else f"above {above}" if above is not None else ""
    high = f"at most {most}" if most is not None else f"below {below}" if below is not None else ""
    texts = [text for text in (low, high) if text]
    return f" {' and '.join(texts)}" if texts else ""
