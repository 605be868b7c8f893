"""Tests use what a caller can use: they touch no private attribute of our classes."""

from __future__ import annotations

import ast
import functools
from collections.abc import Iterator

import pytest

from source_tree import ROOT, modules, syntax_tree

pytestmark = pytest.mark.xdist_group("sources")  # every file of ours is parsed once for all

EXEMPT: dict[tuple[str, str], str] = {}
"""(test file, attribute) -> reason why no public name shows the same."""

LEFT = 39
"""Uses that are neither exempt nor rewritten yet; may only fall."""


def test_tests_touch_no_private_attribute():
    found = [use for use in uses() if use[:2] not in EXEMPT]
    lines = [f"{path}:{line}: {name}" for path, name, line in found]
    assert len(found) <= LEFT, f"private attributes are used ({len(found)}, limit {LEFT}):\n" + "\n".join(lines)


def test_exemptions_are_needed():
    assert set(EXEMPT) - {use[:2] for use in uses()} == set()


def test_private_attributes_are_found():
    tree = ast.parse("class A:\n    _a = 1\n    _b: int\n    def _c(self): self._d, self.e = 1, 2\n_f = 1")
    assert set(private_attributes(tree)) == {"_a", "_b", "_c", "_d"}


@functools.cache
def uses() -> tuple[tuple[str, str, int], ...]:
    """Return (file, attribute, line) of each place where a test reads, sets or patches a private attribute."""
    ours = frozenset(name for file in modules().values() for name in private_attributes(syntax_tree(file)))
    found = []
    for path in sorted((ROOT / "tests").rglob("*.py")):
        tree = syntax_tree(path)
        names = ours - set(private_attributes(tree))  # a test may use those of its own classes
        file = path.relative_to(ROOT / "tests").as_posix()
        found += [(file, name, line) for name, line in attributes_of_others(tree) if name in names]
    return tuple(found)


def attributes_of_others(tree: ast.AST) -> Iterator[tuple[str, int]]:
    """Yield (attribute, line) of each `x.attribute` and `setattr(x, "attribute", ...)` where x is not `self`."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and getattr(node.value, "id", "") != "self":
            yield node.attr, node.lineno
        elif isinstance(node, ast.Call) and is_setattr(node.func) and len(node.args) > 1:
            yield str(getattr(node.args[1], "value", "")), node.lineno


def is_setattr(function: ast.expr) -> bool:
    return getattr(function, "attr", getattr(function, "id", "")) in ("setattr", "getattr", "delattr")


def private_attributes(tree: ast.AST) -> Iterator[str]:
    """Yield the names of private methods, class attributes and instance attributes that classes define."""
    for owner in ast.walk(tree):
        if not isinstance(owner, ast.ClassDef):
            continue
        for statement in owner.body:
            if isinstance(statement, ast.FunctionDef | ast.AsyncFunctionDef):
                targets = [statement.name, *attributes_of_self(statement)]
            elif isinstance(statement, ast.Assign):
                targets = [node.id for target in statement.targets for node in ast.walk(target) if is_name(node)]
            else:
                targets = [statement.target.id] if isinstance(statement, ast.AnnAssign) else []
            yield from (name for name in targets if name.startswith("_") and not name.startswith("__"))


def attributes_of_self(method: ast.AST) -> Iterator[str]:
    """Yield the attributes that a method assigns to `self`."""
    for node in ast.walk(method):
        if (
            isinstance(node, ast.Attribute)
            and isinstance(node.ctx, ast.Store)
            and getattr(node.value, "id", "") == "self"
        ):
            yield node.attr


def is_name(node: ast.AST) -> bool:
    return isinstance(node, ast.Name)
