"""The models, commands and architectures of our own packages, for error messages about packages that are missing.

Read only after a lookup or a recognition failed.

`data/first_party.json` is written by `tools/first_party.py` from the families themselves:

    {"diffsynth-<family>": {"models": {name: hub id or null},
                            "commands": [name, ...],
                            "architectures": {name: [[required key, ...] for each published layout]}}}

Every number in a key is an `N`.
"""

from __future__ import annotations

import difflib
import functools
import importlib.resources
import json
from collections.abc import Iterable, Mapping
from typing import Any

from diffsynth import _env
from diffsynth._entry_points import installed_version, plugin_entries
from diffsynth.core.loader.convert import normalized_key

_ALIKE = 0.6
"""Share of an architecture's required keys that a file must have; below 1 because other tools rename some keys."""


@functools.cache
def packages() -> Mapping[str, Mapping[str, Any]]:
    """Return a dict package name -> dict with its "models", "commands" and "architectures", for our packages, installed
    or not.
    """
    text = importlib.resources.files("diffsynth").joinpath("data/first_party.json").read_text(encoding="utf-8")
    found: dict[str, dict[str, Any]] = json.loads(text)
    return found


def models_by_package() -> dict[str, list[str]]:
    """Return a dict package name -> sorted list of its models' names, for ours with models, installed or not."""
    return {name: sorted(contents["models"]) for name, contents in packages().items() if contents.get("models")}


def where_is_model(name: str) -> str:
    """Return a text on which package has a model and how to get that package; empty if none of our packages has it.

    For example `"It is in diffsynth-x. Run: pip install diffsynth-x"`.

    Args:
        name: a model's name or hub id, in any case.
    """
    distribution = {spelling.lower(): home for spelling, home in _models().items()}.get(name.lower())
    return f"It is in {distribution}. {how_to_get(distribution)}" if distribution else ""


def near_model(name: str) -> str:
    """Return a text with the model of the nearest spelling, its package and how to get it; empty if none is near."""
    homes = _models()
    near = difflib.get_close_matches(name.lower(), [spelling.lower() for spelling in homes], n=1)
    for spelling, distribution in homes.items():
        if near == [spelling.lower()]:
            return f"Did you mean {spelling!r} of {distribution}? {how_to_get(distribution)}"
    return ""


def where_is_command(name: str) -> str:
    """Return a text on which package has a command and how to get it, "It is in x. Run: pip install x"; else empty."""
    return _where("commands", name)


def where_is_architecture(name: str) -> str:
    """Return a text on which package has an architecture and how to get it, "It is in x. Run: pip install x"; else
    empty.
    """
    return _where("architectures", name)


def whose_keys(keys: Iterable[str]) -> str:
    """Return a text on which package, not in use, has the architecture whose required keys are best covered by `keys`,
    and how to get it; empty if less than 60 % are.

    Args:
        keys: the file's keys; they may have a wrapper prefix.
    """
    # Imported here: other users of this module, such as `diffsynth list`, do not need the reader of headers.
    from diffsynth.core.loader.header import wrapper_prefixes

    keys = list(keys)
    views = [
        {normalized_key(key.removeprefix(prefix)) for key in keys if key.startswith(prefix)}
        for prefix in ("", *wrapper_prefixes(keys))
    ]
    found = [
        (max(len(view.intersection(layout)) for view in views) / len(layout), architecture, distribution)
        for distribution, contents in packages().items()
        if not _in_use(distribution)
        for architecture, layouts in contents.get("architectures", {}).items()
        for layout in layouts
    ]
    score, architecture, distribution = max(found, default=(0.0, "", ""))
    if score < _ALIKE:
        return ""
    return f"Its keys are those of {architecture}, which is in {distribution}. {how_to_get(distribution)}"


def how_to_get(distribution: str) -> str:
    """Return a text on how to get a package, `"Run: pip install x"`: install, upgrade, or allow it in
    DIFFSYNTH_PLUGINS.
    """
    names = _plugin_names(distribution)
    if names is None:
        return f"Run: pip install {distribution}"
    allowed = _env.plugins()
    if allowed is not None and not names & allowed:
        wanted = ",".join(sorted(allowed | names))
        return f"{distribution} is installed, but DIFFSYNTH_PLUGINS leaves it out. Set: DIFFSYNTH_PLUGINS={wanted}"
    return f"Run: pip install -U {distribution}"


def _models() -> dict[str, str]:
    """Return a dict model name or hub id -> name of its package, for all models of our packages, installed or not."""
    return {
        spelling: distribution
        for distribution, contents in packages().items()
        for model, hub_id in contents.get("models", {}).items()
        for spelling in (model, hub_id)
        if spelling
    }


def _where(kind: str, name: str) -> str:
    for distribution, contents in packages().items():
        if name in contents.get(kind, ()):
            return f"It is in {distribution}. {how_to_get(distribution)}"
    return ""


def _in_use(distribution: str) -> bool:
    names, allowed = _plugin_names(distribution), _env.plugins()
    return names is not None and (allowed is None or bool(names & allowed))


def _plugin_names(distribution: str) -> frozenset[str] | None:
    """Return a frozenset of the names of a package's diffsynth plugins; None if the package is not installed."""
    if installed_version(distribution) is None:
        return None
    return frozenset(entry.name for entry in plugin_entries()[0] if entry.distribution == distribution)
