"""Attention backends that plugins declare join `attention()` when the first pipeline is built."""

from __future__ import annotations

import threading

from diffsynth import _discovery
from diffsynth._discovery import Declared
from diffsynth.core.attention.registry import register_backend
from diffsynth.spec import AttentionSpec, resolve

_lock = threading.Lock()
_in_use: set[Declared[AttentionSpec]] = set()


def use_declared_backends() -> None:
    """Register every declared backend once. One that cannot be used is left out and becomes a problem of its plugin.

    Raises:
        BrokenPlugin: one cannot be used, and DIFFSYNTH_STRICT_PLUGINS is on.
    """
    with _lock:
        for declared in _discovery.catalog().attention:
            if declared in _in_use:
                continue
            try:
                _use(declared.spec)
                _in_use.add(declared)
            except Exception as error:
                _discovery.report(
                    declared,
                    f"attention backend {declared.spec.name!r} is left out: {type(error).__name__}: {error}. "
                    f"Without the plugin: pip uninstall {declared.distribution}",
                    cause=error,
                )


def _use(fact: AttentionSpec) -> None:
    backend = resolve(fact.backend)
    if not callable(backend) or not callable(getattr(backend, "refuses", None)):
        raise TypeError(f"{fact.backend!r} is {backend!r}; expected an object with refuses(call) and __call__(call)")
    workspace = resolve(fact.workspace) if fact.workspace else None
    register_backend(fact.name, backend, priority=fact.priority, workspace=workspace)
