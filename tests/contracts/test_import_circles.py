"""No circle of imports between our modules.

An import counts wherever it stands: at the top, inside a function, or under `if TYPE_CHECKING:`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from source_tree import imports, modules

EXEMPT: dict[tuple[str, str], str] = {}
"""(module, module that it imports) -> reason why this import must close a circle."""


def graph() -> dict[str, set[str]]:
    """Return module -> modules of ours that it imports, without the exempt imports."""
    return {
        name: {
            imported
            for imported, _ in imports(name, for_type_checkers=True)
            if imported != name and imported in modules() and (name, imported) not in EXEMPT
        }
        for name in modules()
    }


def circles(edges: Mapping[str, set[str]]) -> Iterator[list[str]]:
    """Yield each set of modules that import one another, sorted: the strongly connected components (Tarjan, 1972)."""
    index: dict[str, int] = {}
    lowest: dict[str, int] = {}
    stack: list[str] = []

    def visit(name: str) -> Iterator[list[str]]:
        index[name] = lowest[name] = len(index)
        stack.append(name)
        for imported in sorted(edges.get(name, ())):
            if imported not in index:
                yield from visit(imported)
                lowest[name] = min(lowest[name], lowest[imported])
            elif imported in stack:
                lowest[name] = min(lowest[name], index[imported])
        if lowest[name] == index[name]:
            members = stack[stack.index(name) :]
            del stack[stack.index(name) :]
            if len(members) > 1:
                yield sorted(members)

    for name in sorted(edges):
        if name not in index:
            yield from visit(name)


def test_no_modules_import_one_another():
    edges = graph()
    found = []
    for members in circles(edges):
        lines = [f"    {name} imports {', '.join(sorted(edges[name] & set(members)))}" for name in members]
        found.append("\n".join([f"{len(members)} modules import one another:", *lines]))
    assert not found, "\n".join(found)


def test_exemptions_are_needed():
    for name, imported in EXEMPT:
        there = {one for one, _ in imports(name, for_type_checkers=True)} if name in modules() else set()
        assert imported in there, f"{name} does not import {imported} any more"


def test_circles_are_found():
    edges = {"a": {"b"}, "b": {"c", "d"}, "c": {"a"}, "d": {"e"}, "e": {"d"}, "f": {"a"}}
    assert sorted(circles(edges)) == [["a", "b", "c"], ["d", "e"]]
