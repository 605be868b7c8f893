"""Attention backends that plugins declare; they are registered when the first pipeline is built."""

from __future__ import annotations

import threading

from diffsynth import _discovery
from diffsynth._discovery import Declared
from diffsynth.core.attention.registry import register_backend
from diffsynth.spec import AttentionSpec, resolve

_lock = threading.Lock()
_in_use: set[Declared[AttentionSpec]] = set()


def use_declared_backends() -> None:
    """Register every attention backend of plugins once; one that cannot be used is left out and recorded as a problem.

    Raises:
        BrokenPlugin: a backend cannot be used, and DIFFSYNTH_STRICT_PLUGINS is on.
    """
    with _lock:
        for declared in _discovery.catalog().attention:
            if declared in _in_use:
                continue
            try:
                _register(declared.spec)
                _in_use.add(declared)
            except Exception as error:
                _discovery.report(
                    declared,
                    f"attention backend {declared.spec.name!r} is left out: {type(error).__name__}: {error}. "
                    f"Without the plugin: pip uninstall {declared.distribution}",
                    cause=error,
                )


def _register(spec: AttentionSpec) -> None:
    backend = resolve(spec.backend)
    if not callable(backend) or not callable(getattr(backend, "refuses", None)):
        raise TypeError(f"{spec.backend!r} is {backend!r}; expected an object with refuses(call) and __call__(call)")
    workspace = resolve(spec.workspace) if spec.workspace else None
    register_backend(spec.name, backend, priority=spec.priority, workspace=workspace)
