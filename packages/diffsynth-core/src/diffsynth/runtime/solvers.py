"""Solvers by name: those of core, and those that plugins declare by `register_solvers`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from diffsynth import _discovery
from diffsynth._discovery import Declared
from diffsynth.errors import did_you_mean
from diffsynth.spec import SolverSpec, resolve


def solver_names() -> tuple[str, ...]:
    """Return a tuple of the names of all declared solvers, core's first, then by plugin name.

    Raises:
        BrokenPlugin: two solvers have one name, and DIFFSYNTH_STRICT_PLUGINS is on.
    """
    return tuple(_declared_solvers())


def find_solver(name: str) -> SolverSpec:
    """Return the `SolverSpec` of this name; raise ValueError, which names the nearest spelling, if there is none.

    Of two solvers with one name the first is returned: core's, or that of the plugin whose name sorts first. The other
    is left out and recorded as a problem of its plugin.

    Raises:
        ValueError: unknown solver; the message lists the names.
        TypeError: `name` is no text.
        BrokenPlugin: two solvers have one name, and DIFFSYNTH_STRICT_PLUGINS is on.
    """
    if not isinstance(name, str):
        raise TypeError(f"solver={name!r}: expected a name such as 'euler'")
    solvers = _declared_solvers()
    if name not in solvers:
        raise ValueError(
            f"solver {name!r} is unknown{did_you_mean(name, solvers)}; expected one of {', '.join(solvers)}"
        )
    return solvers[name].spec


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


def _declared_solvers() -> dict[str, Declared[SolverSpec]]:
    """Return name -> declaration, the first of each name; later ones are recorded as problems."""
    solvers: dict[str, Declared[SolverSpec]] = {}
    for declared in _discovery.catalog().solvers:
        name = declared.spec.name
        first = solvers.setdefault(name, declared)
        if first is not declared:
            error = ValueError(f"solver {name!r} is already declared by {first.plugin} ({first.distribution})")
            _discovery.report(
                declared,
                f"solver {name!r} is left out: {type(error).__name__}: {error}. "
                f"Without the plugin: pip uninstall {declared.distribution}",
                cause=error,
            )
    return solvers
