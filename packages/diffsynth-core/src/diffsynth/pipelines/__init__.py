"""Doors of families: `diffsynth.pipelines.<name>` is a module that an installed family declares by `register_doors`.

They keep scripts for DiffSynth-Studio working; new code imports the family itself.
"""

from __future__ import annotations

import importlib.util
from pathlib import Path

from diffsynth import _discovery
from diffsynth.compat.doors import with_doors


def _folders() -> list[str]:
    """Return the folders of the declared doors, without importing the families."""
    found = []
    for declared in _discovery.catalog().doors:
        package, _, folder = declared.spec.folder.partition(":")
        spec = importlib.util.find_spec(package)
        if spec is not None:
            found += [str(Path(location) / folder) for location in spec.submodule_search_locations or ()]
    return found


def find_doors() -> None:
    """Add the folders of the declared doors to this package, as when a plugin was registered; others stay."""
    global __path__
    # The families' folders come first, so that their doors replace those for families that are not there yet.
    __path__ = list(dict.fromkeys(with_doors([*_folders(), *__path__], "pipelines")))


find_doors()
