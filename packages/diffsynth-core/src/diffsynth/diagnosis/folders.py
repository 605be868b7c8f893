"""Settings in effect, and the folders that files go to."""

from __future__ import annotations

import importlib.metadata
import inspect
import os
import re
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from diffsynth import _discovery, _env
from diffsynth.diagnosis.finding import Finding
from diffsynth.diagnosis.machine import GIB, in_gib
from diffsynth.errors import did_you_mean

HUB_VARIABLES = ("HF_ENDPOINT", "HF_HOME", "HF_HUB_OFFLINE", "HF_TOKEN", "MODELSCOPE_CACHE", "MODELSCOPE_DOMAIN")
"""Variables of the libraries that download; shown where they are set."""

LITTLE = 30 * GIB
"""A large model does not fit into less."""


def settings() -> Iterator[Finding]:
    """Every environment variable of ours with its value, bad ones, unknown ones, and those of the hubs' libraries."""
    ours = {_variable(reader): reader for reader in vars(_env).values() if _is_reader(reader)}
    for variable, reader in ours.items():
        yield _setting(variable, reader)
    for variable in sorted(name for name in os.environ if name.startswith("DIFFSYNTH_") and name not in ours):
        seen = f"{os.environ[variable]!r}: there is no such variable{did_you_mean(variable, ours)}"
        yield Finding(variable, "note", seen, f"Correct the name, or: unset {variable}")
    installed = {entry.name for entry in importlib.metadata.entry_points(group=_discovery.GROUP)}
    for name in sorted((_env.plugins() or frozenset()) - installed):
        seen = f"names {name!r}, which is not installed{did_you_mean(name, installed)}"
        yield Finding("DIFFSYNTH_PLUGINS", "note", seen, "Correct the name; diffsynth plugins lists them")
    for variable in HUB_VARIABLES:
        if value := os.environ.get(variable):
            yield Finding(variable, "ok", "set, not shown" if "TOKEN" in variable else _without_login(value))


def folders() -> Iterator[Finding]:
    """Where weights and caches go: writable, and with room."""
    yield _folder("weights", _env.model_base_path(), "DIFFSYNTH_MODEL_BASE_PATH", enough=LITTLE)
    yield _folder("cache", _env.cache_dir(), "DIFFSYNTH_CACHE_DIR", enough=GIB)


def _is_reader(value: Any) -> bool:
    return inspect.isfunction(value) and value.__module__ == _env.__name__ and not value.__name__.startswith("_")


def _variable(reader: Callable[[], Any]) -> str:
    """The first word of a reader's docstring is its variable."""
    return (reader.__doc__ or "").partition(":")[0]


def _setting(variable: str, reader: Callable[[], Any]) -> Finding:
    given = os.environ.get(variable)
    try:
        value = reader()
    except ValueError as error:
        return Finding(variable, "broken", str(error), f"Correct it, or: unset {variable}", cause=error)
    return Finding(
        variable, "ok", f"{_shown(value)} (not set)" if given is None else f"{_shown(value)} (set: {given!r})"
    )


def _shown(value: Any) -> str:
    if value is None:
        return "all"
    if isinstance(value, frozenset):
        return ", ".join(sorted(value)) or "none"
    return str(value).lower() if isinstance(value, bool) else str(value)


def _without_login(value: str) -> str:
    return re.sub(r"//[^/@]*@", "//***@", value)


def _folder(name: str, path: Path, variable: str, *, enough: int) -> Finding:
    path = path.expanduser().absolute()
    there = path
    while not there.exists() and there != there.parent:
        there = there.parent
    move = f"Set {variable} to a folder with room that you may write to"
    if not there.is_dir():
        return Finding(name, "broken", f"{path}: {there} is a file", move)
    if not os.access(there, os.W_OK | os.X_OK):
        return Finding(name, "broken", f"{path} cannot be written", move)
    free = shutil.disk_usage(there).free
    seen = f"{path}{'' if path == there else ' (made when needed)'}, {in_gib(free)} free"
    if free < enough:
        return Finding(name, "note", f"{seen}: little", f"Make room there before a large download. Or: {move}")
    return Finding(name, "ok", seen)
