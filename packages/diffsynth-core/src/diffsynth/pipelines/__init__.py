"""The doors of families: `diffsynth.pipelines.<name>` is a module that an installed family offers by `register_doors`.

New code imports the family itself; these names keep scripts working that were written for DiffSynth-Studio.
"""

from __future__ import annotations

import importlib.util
from pathlib import Path

from diffsynth import _discovery


def _folders() -> list[str]:
    """Folders of the declared doors, found without importing the families."""
    found = []
    for declared in _discovery.catalog().doors:
        package, _, folder = declared.spec.folder.partition(":")
        spec = importlib.util.find_spec(package)
        if spec is not None:
            found += [str(Path(place) / folder) for place in spec.submodule_search_locations or ()]
    return found


__path__ = [*__path__, *_folders()]
