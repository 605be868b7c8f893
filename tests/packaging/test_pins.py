"""The pins in pyproject.toml equal the installed packages, in both directions."""

from __future__ import annotations

import importlib.util
import tomllib
from importlib.metadata import PackageNotFoundError, distributions, requires
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parents[2]
PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
PINS = [Requirement(pin) for pin in PYPROJECT["tool"]["uv"]["constraint-dependencies"]]
OURS = {tomllib.loads(path.read_text())["project"]["name"] for path in ROOT.glob("packages/*/pyproject.toml")}
HOW = "Run: uv lock && uv run --all-packages tools/pin.py && uv sync --all-packages"


def installed() -> dict[str, str]:
    found = {canonicalize_name(package.name): package.version for package in distributions()}
    return {name: version for name, version in found.items() if name not in OURS}


def pinned_here() -> dict[str, str]:
    return {pin.name: str(pin.specifier)[2:] for pin in PINS if pin.marker is None or pin.marker.evaluate()}


def needed_here() -> set[str]:
    """Return the names of all direct and transitive dependencies of our packages and groups on this platform."""
    waiting = [Requirement(name) for name in OURS]
    waiting += [Requirement(line) for group in PYPROJECT["dependency-groups"].values() for line in group]
    seen: set[tuple[str, frozenset[str]]] = set()
    while waiting:
        requirement = waiting.pop()
        key = canonicalize_name(requirement.name), frozenset(requirement.extras)
        if key in seen:
            continue
        seen.add(key)
        try:
            lines = requires(requirement.name) or []
        except PackageNotFoundError:
            continue
        children = [Requirement(line) for line in lines]
        extras = ["", *requirement.extras]
        waiting += [c for c in children if c.marker is None or any(c.marker.evaluate({"extra": e}) for e in extras)]
    return {name for name, _ in seen}


def test_everything_installed_is_pinned_at_its_version():
    pins = pinned_here()
    loose = {name: (version, pins.get(name)) for name, version in installed().items() if pins.get(name) != version}
    assert not loose, f"installed, but not what is pinned (name: installed, pinned): {loose}. {HOW}"


def test_everything_pinned_is_installed_or_for_another_platform():
    needed = needed_here()
    absent = sorted(pinned_here().keys() - installed().keys())
    assert not needed & set(absent), f"pinned and needed here, but not installed: {absent}. {HOW}"


def test_every_pin_is_one_exact_version():
    assert len(PINS) > 50
    for pin in PINS:
        assert [specifier.operator for specifier in pin.specifier] == ["=="], str(pin)
        assert pin.url is None
        assert not pin.specifier.contains("*")


def test_pins_are_sorted_and_name_none_of_ours():
    texts = PYPROJECT["tool"]["uv"]["constraint-dependencies"]
    assert texts == sorted(texts)
    assert not OURS & {pin.name for pin in PINS}


def test_every_direct_dependency_is_pinned_within_its_bounds():
    """Bounds of a package that exclude the pinned version would make the workspace unsolvable on a new machine."""
    direct = [line for group in PYPROJECT["dependency-groups"].values() for line in group]
    for path in ROOT.glob("packages/*/pyproject.toml"):
        direct += tomllib.loads(path.read_text(encoding="utf-8"))["project"]["dependencies"]
    for requirement in map(Requirement, direct):
        name = canonicalize_name(requirement.name)
        if name in OURS:
            continue
        versions = [str(pin.specifier)[2:] for pin in PINS if pin.name == name]
        assert versions, f"{requirement} has no pin. {HOW}"
        assert all(version in requirement.specifier for version in versions), f"{requirement} but {versions}. {HOW}"


def test_the_writer_replaces_the_list_and_nothing_else():
    spec = importlib.util.spec_from_file_location("pin", ROOT / "tools" / "pin.py")
    pin = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(pin)
    empty = '[tool.uv]\nconstraint-dependencies = []\n\n[other]\nkeep = ["a"]\n'
    once = pin.with_pins(empty, ["a==1", "b==2; sys_platform == 'linux'"])
    assert tomllib.loads(once) == {
        "tool": {"uv": {"constraint-dependencies": ["a==1", "b==2; sys_platform == 'linux'"]}},
        "other": {"keep": ["a"]},
    }
    assert pin.with_pins(once, []) == pin.with_pins(empty, [])
    with pytest.raises(ValueError, match="has 0 lists"):
        pin.with_pins("[tool.uv]\n", [])
