"""Attention backends that plugins declare; they are registered when the first pipeline is built."""

from __future__ import annotations

import threading
from typing import Any

from diffsynth import _discovery
from diffsynth._discovery import Declared
from diffsynth.core.attention.registry import BACKENDS, register_backend, unregister_backend
from diffsynth.spec import AttentionSpec, resolve

_lock = threading.Lock()
_in_use: dict[Declared[AttentionSpec], Any] = {}
"""Declaration -> backend, of those that are registered."""


def use_declared_backends() -> None:
    """Register every attention backend of plugins once; one that cannot be used is left out and recorded as a problem.
    Those that are declared no more, or that name another object since, are removed.

    Raises:
        BrokenPlugin: a backend cannot be used, and DIFFSYNTH_STRICT_PLUGINS is on.
    """
    with _lock:
        wanted = _discovery.catalog().attention
        for declared in [each for each in _in_use if each not in wanted]:
            _remove(declared)
        for declared in wanted:
            try:
                backend = resolve(declared.spec.backend)
                if declared in _in_use and _in_use[declared] is not backend:
                    _remove(declared)
                if declared not in _in_use:
                    _register(declared.spec, backend)
                    _in_use[declared] = backend
            except Exception as error:
                _discovery.report(
                    declared,
                    f"attention backend {declared.spec.name!r} is left out: {type(error).__name__}: {error}. "
                    f"Without the plugin: {_discovery.removal(declared)}",
                    cause=error,
                )


def provider_of(backend: str) -> Declared[AttentionSpec] | None:
    """Return the declaration of the plugin's backend that is registered under a name; None for core's own."""
    with _lock:
        return next((declared for declared in _in_use if declared.spec.name == backend), None)


def _remove(declared: Declared[AttentionSpec]) -> None:
    if declared.spec.name in BACKENDS:
        unregister_backend(declared.spec.name)
    del _in_use[declared]


def _register(spec: AttentionSpec, backend: Any) -> None:
    if not callable(backend) or not callable(getattr(backend, "refuses", None)):
        raise TypeError(f"{spec.backend!r} is {backend!r}; expected an object with refuses(call) and __call__(call)")
    workspace = resolve(spec.workspace) if spec.workspace else None
    register_backend(spec.name, backend, priority=spec.priority, workspace=workspace)
