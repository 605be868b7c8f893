"""The quantization methods by name, as plugins declare them by `register_quantization`; core declares its own so."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

from diffsynth import _discovery
from diffsynth.core.quant.method import QuantMethod
from diffsynth.errors import did_you_mean, shown
from diffsynth.spec import resolve


def methods() -> dict[str, str]:
    """Return a dict name -> description of the methods of all installed plugins."""
    return {one.spec.name: one.spec.description for one in _discovery.catalog().quantization}


def method_of(name: str, options: Mapping[str, Any]) -> QuantMethod:
    """Return the method of a name with options.

    Raises:
        ValueError: an unknown name or option, or a value that the method refuses.
        Unavailable: the library of the method is not installed.
    """
    declared = {one.spec.name: one.spec for one in _discovery.catalog().quantization}
    if name not in declared:
        raise ValueError(
            f"method {shown(name)} is unknown{did_you_mean(name, declared)} Expected {', '.join(declared)}"
        )
    make = resolve(declared[name].backend)
    parameters = inspect.signature(make).parameters
    for option in options:
        if option not in parameters:
            takes = f"It takes {', '.join(parameters)}" if parameters else "It takes none"
            raise ValueError(
                f"method {name!r} has no option {shown(option)}{did_you_mean(str(option), parameters)} {takes}"
            )
    made: QuantMethod = make(**options)
    return made
