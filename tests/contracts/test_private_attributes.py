"""Tests use what a caller can use: they touch no private attribute of our classes."""

from __future__ import annotations

import ast
import functools
from collections.abc import Iterator

from source_tree import ROOT, modules, syntax_tree

READS = "counts or forbids reads of a file; a loaded module does not show when it was read"
SPEEDS = "fixed speeds in place of measured ones, so that a plan is the same on every machine"
IN_USE = "backends of an earlier test are forgotten; they are a state of the process"

EXEMPT: dict[tuple[str, str], str] = {
    ("core/loader/reader/test_full_size.py", "_read"): READS,
    ("core/loader/reader/test_source.py", "_make"): "runs the steps of a load on a fake device, one by one",
    ("core/loader/reader/test_source.py", "_read"): READS,
    ("core/loader/reader/test_source.py", "_reader"): "runs the steps of a load on a fake device, one by one",
    ("core/loader/reader/test_source.py", "_requests"): "runs the steps of a load on a fake device, one by one",
    (
        "core/loader/reader/test_source.py",
        "_targets",
    ): "the plan of each tensor, as the reference implementation reads it",
    ("core/loader/test_component.py", "_read"): READS,
    ("core/loader/test_components.py", "_read"): READS,
    ("docs/test_hooks.py", "_in_use"): IN_USE,
    ("models/test_wan_autoencoder.py", "_decode_piece"): "one step of the streaming decoder, for the size of its cache",
    ("plugins/test_declared_backends.py", "_in_use"): IN_USE,
    ("flux/test_memory.py", "_speeds"): SPEEDS,
    ("runtime/test_auto_policy.py", "_speeds"): SPEEDS,
    ("testing/conftest.py", "_in_use"): IN_USE,
    ("zimage/test_plan.py", "_speeds"): SPEEDS,
}
"""(test file, attribute) -> reason why no public name shows the same."""


def test_tests_touch_no_private_attribute():
    found = [use for use in uses() if use[:2] not in EXEMPT]
    lines = [f"{path}:{line}: {name}" for path, name, line in found]
    assert not found, "tests use private attributes:\n" + "\n".join(lines)


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
