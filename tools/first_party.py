"""Write `diffsynth/data/first_party.json`: what each of our packages has, so that core can say which one to install.

    uv run --all-packages tools/first_party.py

after a family declares a model, a command, an architecture or a layout. A test holds the file to what is declared.
"""

from __future__ import annotations

import gzip
import importlib.resources
import json
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from diffsynth import _discovery
from diffsynth._discovery import Catalog
from diffsynth.core.loader import convert
from diffsynth.core.loader.first_party import normal
from diffsynth.spec import ArchitectureSpec, CheckpointSpec, resolve

ROOT = Path(__file__).parents[1]
TARGET = ROOT / "packages/diffsynth-core/src/diffsynth/data/first_party.json"


def ours() -> list[str]:
    """The distributions of this workspace that need not be installed: all but core."""
    files = ROOT.glob("packages/*/pyproject.toml")
    names = [tomllib.loads(file.read_text(encoding="utf-8"))["project"]["name"] for file in files]
    return sorted(set(names) - {_discovery.CORE[1]})


def collect(catalog: Catalog, distributions: list[str]) -> dict[str, dict[str, Any]]:
    """Distribution -> models, commands and architectures that it declares; a distribution without any is left out."""
    found = {}
    for distribution in distributions:
        contents = {
            "models": {one.spec.name: one.spec.hub_id for one in catalog.models if one.distribution == distribution},
            "commands": sorted(one.spec.name for one in catalog.commands if one.distribution == distribution),
            "architectures": {
                one.spec.name: _layouts(one.spec, catalog)
                for one in catalog.architectures
                if one.distribution == distribution
            },
        }
        if kept := {kind: facts for kind, facts in contents.items() if facts}:
            found[distribution] = kept
    return found


def _layouts(architecture: ArchitectureSpec, catalog: Catalog) -> list[list[str]]:
    checkpoints = [one.spec for one in catalog.checkpoints if one.spec.architecture == architecture.name]
    named = {tuple(sorted(keys)) for checkpoint in checkpoints for keys in _required(architecture, checkpoint)}
    return [list(keys) for keys in sorted(named or {tuple(sorted(map(_own, architecture.required)))})]


def _required(architecture: ArchitectureSpec, checkpoint: CheckpointSpec) -> Iterator[set[str]]:
    """The required keys under the names of a published file; none for a layout that no file proves."""
    required = {_own(pattern) for pattern in architecture.required}
    if not checkpoint.rules:
        yield required
    elif checkpoint.layout:
        plan = convert.plan(resolve(checkpoint.rules), published(checkpoint.layout))
        yield {
            normal(source)
            for key, target in plan.targets.items()
            if normal(key) in required
            for source in target.sources
        }


def published(layout: str) -> dict[str, tuple[int, ...]]:
    """Key -> shape of a layout file, `package:path`."""
    package, _, path = layout.partition(":")
    data = json.loads(gzip.decompress(importlib.resources.files(package).joinpath(path).read_bytes()))
    return {key: tuple(shape) for key, shape in data["tensors"].items()}


def _own(pattern: str) -> str:
    return normal(pattern.replace("{n}", "0"))


def text() -> str:
    """The file as it should be."""
    return json.dumps(collect(_discovery.catalog(), ours()), indent=1, sort_keys=True) + "\n"


if __name__ == "__main__":
    TARGET.write_text(text(), encoding="utf-8")
    print(TARGET.relative_to(ROOT))
