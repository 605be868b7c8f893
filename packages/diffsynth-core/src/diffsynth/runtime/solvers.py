"""Solvers by name: those of core, and those that plugins declare by `register_solvers`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from diffsynth import _discovery
from diffsynth.errors import did_you_mean
from diffsynth.spec import SolverSpec, resolve


def solver_names() -> tuple[str, ...]:
    """Return a tuple of the names of all declared solvers, core's first, then by plugin name."""
    return tuple(dict.fromkeys(one.spec.name for one in _discovery.catalog().solvers))


def find_solver(name: str) -> SolverSpec:
    """Return the `SolverSpec` of this name; raise ValueError, which names the nearest spelling, if there is none.

    Of two solvers with one name, which are a problem of their plugins, the first is returned: core's, or that of the
    plugin whose name sorts first.

    Raises:
        ValueError: unknown solver; the message lists the names.
        TypeError: `name` is no text.
    """
    if not isinstance(name, str):
        raise TypeError(f"solver={name!r}: expected a name such as 'euler'")
    for one in _discovery.catalog().solvers:
        if one.spec.name == name:
            return one.spec
    known = solver_names()
    raise ValueError(f"solver {name!r} is unknown{did_you_mean(name, known)}; expected one of {', '.join(known)}")


def load_solver(spec: SolverSpec) -> Callable[..., Any]:
    """Import and return the function that a `SolverSpec` names, called as `diffsynth.sampling.solver.euler` is.

    Raises:
        ImportError: its module cannot be imported or lacks the function.
        TypeError: the reference names no function.
    """
    solver = resolve(spec.solver)
    if not callable(solver):
        raise TypeError(
            f"solver {spec.name!r}: {spec.solver!r} is {solver!r}; expected a function with the arguments of "
            f"diffsynth.sampling.solver.euler"
        )
    return solver
