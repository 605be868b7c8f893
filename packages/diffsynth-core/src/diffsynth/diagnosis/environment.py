"""Checks of environment variables, and of the folders for weights and caches."""

from __future__ import annotations

import inspect
import os
import re
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from diffsynth import _env
from diffsynth._entry_points import plugin_entries
from diffsynth.diagnosis.finding import Finding
from diffsynth.diagnosis.machine import GIB, in_gib
from diffsynth.errors import did_you_mean

HUB_VARIABLES = ("HF_ENDPOINT", "HF_HOME", "HF_HUB_OFFLINE", "HF_TOKEN", "MODELSCOPE_CACHE", "MODELSCOPE_ENDPOINT")
"""Variables of the download libraries; shown if they are set."""

WEIGHTS_SPACE = 30 * GIB
"""Free disk space in bytes below which a large model does not fit."""


def settings() -> Iterator[Finding]:
    """Yield a `Finding` for each variable of diffsynth, each unknown DIFFSYNTH_ variable, each name in
    DIFFSYNTH_PLUGINS that is not installed, and each variable of the download libraries that is set.
    """
    ours = variable_readers()
    for variable, reader in ours.items():
        yield _setting(variable, reader)
    for variable in sorted(name for name in os.environ if name.startswith("DIFFSYNTH_") and name not in ours):
        seen = f"{os.environ[variable]!r}: no such variable{did_you_mean(variable, ours)}"
        yield Finding(variable, "note", seen, f"Correct the name, or: unset {variable}")
    installed = {entry.name for entry in plugin_entries()[0]}
    for name in sorted((_env.plugins() or frozenset()) - installed):
        seen = f"names {name!r}, which is not installed{did_you_mean(name, installed)}"
        yield Finding("DIFFSYNTH_PLUGINS", "note", seen, "Correct the name; diffsynth plugins lists them")
    for variable in HUB_VARIABLES:
        if value := os.environ.get(variable):
            yield Finding(variable, "ok", "set, not shown" if "TOKEN" in variable else _without_login(value))


def folders() -> Iterator[Finding]:
    """Yield two `Finding`s: whether the folders of weights and of caches are writable and have enough free space."""
    yield _folder("weights", _env.model_base_path(), "DIFFSYNTH_MODEL_BASE_PATH", enough=WEIGHTS_SPACE)
    yield _folder("cache", _env.cache_dir(), "DIFFSYNTH_CACHE_DIR", enough=GIB)


def variable_readers() -> dict[str, Callable[[], Any]]:
    """Return a dict: name of an environment variable -> function of `diffsynth._env` that reads it."""
    functions = [value for value in vars(_env).values() if inspect.isfunction(value)]
    readers = [each for each in functions if each.__module__ == _env.__name__ and not each.__name__.startswith("_")]
    return {(reader.__doc__ or "").partition(":")[0]: reader for reader in readers}


def _setting(variable: str, reader: Callable[[], Any]) -> Finding:
    text = os.environ.get(variable)
    try:
        value = reader()
    except ValueError as error:
        return Finding(variable, "broken", str(error), f"Correct it, or: unset {variable}", cause=error)
    return Finding(variable, "ok", f"{_shown(value)} ({'not set' if text is None else f'set: {text!r}'})")


def _shown(value: Any) -> str:
    if value is None:
        return "all"
    if isinstance(value, frozenset):
        return ", ".join(sorted(value)) or "none"
    return str(value).lower() if isinstance(value, bool) else str(value)


def _without_login(value: str) -> str:
    """Return `value` with the login in a URL replaced: "https://me:key@hub" -> "https://***@hub"."""
    return re.sub(r"//[^/@]*@", "//***@", value)


def _folder(name: str, path: Path, variable: str, *, enough: int) -> Finding:
    path = path.expanduser().absolute()
    existing = path
    while not existing.exists() and existing != existing.parent:
        existing = existing.parent
    move = f"Set {variable} to a writable folder with enough free space"
    if not existing.is_dir():
        return Finding(name, "broken", f"{path}: {existing} is a file", move)
    if not os.access(existing, os.W_OK | os.X_OK):
        return Finding(name, "broken", f"{path} cannot be written", move)
    free = shutil.disk_usage(existing).free
    seen = f"{path}{'' if path == existing else ' (created when needed)'}, {in_gib(free)} free"
    if free < enough:
        return Finding(name, "note", f"{seen}: little", f"Free space there before a large download. Or: {move}")
    return Finding(name, "ok", seen)
