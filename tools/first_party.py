"""Write `diffsynth/data/first_party.json`: the models, commands and architectures of each of our packages.

Core reads the file to name the package to install. Run

    uv run --all-packages tools/first_party.py

after a family declares a model, a command, an architecture or a layout. A test compares the file with the declarations.
"""

from __future__ import annotations

import json
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from diffsynth import _discovery
from diffsynth._discovery import Catalog
from diffsynth.core.loader import convert
from diffsynth.core.loader.convert import normalized_key
from diffsynth.core.loader.layouts import layout_of, rules_of
from diffsynth.spec import ArchitectureSpec, CheckpointSpec

ROOT = Path(__file__).parents[1]
TARGET = ROOT / "packages/diffsynth-core/src/diffsynth/data/first_party.json"


def ours() -> list[str]:
    """Return the names of the workspace's distributions that may be missing: all but core."""
    files = ROOT.glob("packages/*/pyproject.toml")
    names = [tomllib.loads(file.read_text(encoding="utf-8"))["project"]["name"] for file in files]
    return sorted(set(names) - {_discovery.CORE[1]})


def collect(catalog: Catalog, distributions: list[str]) -> dict[str, dict[str, Any]]:
    """Map each distribution to the models, commands and architectures it declares; omit those that declare none."""
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
        if declared := {kind: specs for kind, specs in contents.items() if specs}:
            found[distribution] = declared
    return found


def _layouts(architecture: ArchitectureSpec, catalog: Catalog) -> list[list[str]]:
    declared = [one.spec for one in catalog.checkpoints if one.spec.architecture == architecture.name]
    checkpoints = [checkpoint for checkpoint in declared if not checkpoint.loras_only]
    named = {tuple(sorted(keys)) for checkpoint in checkpoints for keys in _required(architecture, checkpoint)}
    return [list(keys) for keys in sorted(named or {tuple(sorted(map(_own, architecture.required)))})]


def _required(architecture: ArchitectureSpec, checkpoint: CheckpointSpec) -> Iterator[set[str]]:
    """Yield the required keys under their published names; yield nothing for rules without a layout file."""
    required = {_own(pattern) for pattern in architecture.required}
    if not checkpoint.rules:
        yield required
    elif checkpoint.layout:
        plan = convert.plan(rules_of(checkpoint), layout_of(checkpoint))
        yield {
            normalized_key(source)
            for key, target in plan.targets.items()
            if normalized_key(key) in required
            for source in target.sources
        }


def _own(pattern: str) -> str:
    return normalized_key(pattern.replace("{n}", "0"))


def text() -> str:
    """Return the content that the file should have."""
    return json.dumps(collect(_discovery.catalog(), ours()), indent=1, sort_keys=True) + "\n"


if __name__ == "__main__":
    TARGET.write_text(text(), encoding="utf-8")
    print(TARGET.relative_to(ROOT))
