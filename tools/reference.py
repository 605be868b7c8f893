"""Write the generated parts of the manual: the entries of public names and the units of pipelines.

    uv run --all-packages tools/reference.py

A page says between two comments what stands there, and a test compares the text with the code:

    <!-- api: diffsynth.core.gradient -->           an entry for each public name of a module
    <!-- api: diffsynth.spec ModelSpec -->          for these names of it
    <!-- api-list: diffsynth.sampling.noise -->     one line for each, with the first sentence of its docstring
    <!-- arguments: diffsynth.hookspecs step_done -->  what its docstring says of the arguments
    <!-- units: diffsynth_wan:WanVideoPipeline -->  the units of a pipeline in running order
    <!-- end -->
"""

from __future__ import annotations

import ast
import dataclasses
import enum
import functools
import importlib
import inspect
import re
import sys
import textwrap
import typing
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from types import ModuleType
from typing import Any

from diffsynth.runtime.composition import compose
from diffsynth.runtime.unit import Unit
from diffsynth.spec import resolve

ROOT = Path(__file__).parents[1]
PART = re.compile(
    r"^<!-- (api|api-list|arguments|units): ([\w.:]+)((?: \w+)*) -->\n(.*?)^<!-- end -->$", re.MULTILINE | re.DOTALL
)
SECTION = re.compile(r"^(Args|Attributes|Returns|Yields|Raises):\n((?:^ .*\n?|^\n)+)", re.MULTILINE)
ENTRY = re.compile(r"^ {4}(\*{0,2}\w+(?:, \*{0,2}\w+)*): (.+?)(?=^ {4}\S|\Z)", re.MULTILINE | re.DOTALL)
CODE = re.compile(r"(``?[^`]+``?)")


def pages() -> list[Path]:
    """Return the pages of the manual that have generated parts."""
    return [page for page in sorted(ROOT.glob("docs/**/*.md")) if PART.search(page.read_text(encoding="utf-8"))]


def rewritten(text: str) -> str:
    """Return the text of a page with its generated parts made anew."""

    def part(found: re.Match[str]) -> str:
        kind, target, names = found[1], found[2], found[3].split()
        made = units(target) if kind == "units" else entries(target, names, kind)
        return f"{found[0].partition(chr(10))[0]}\n\n{made.strip()}\n\n<!-- end -->"

    return PART.sub(part, text)


def documented(text: str) -> Iterator[tuple[str, str]]:
    """Yield (module, name) of each name that the generated parts of a page describe."""
    for kind, target, names, _ in PART.findall(text):
        if kind.startswith("api"):
            yield from ((target, name) for name in names.split() or public_names(importlib.import_module(target)))


def public_names(module: ModuleType) -> list[str]:
    """Return the public names of a module: those of `__all__`, or all that it defines and describes, in the order of
    the code.
    """
    if "__all__" in vars(module):
        return [name for name in module.__all__ if not name.startswith("__")]
    assigned = [name for name in constants(module) if not name.startswith("_")]
    defined = [
        name
        for name, value in vars(module).items()
        if not name.startswith("_") and getattr(value, "__module__", "") == module.__name__ and callable(value)
    ]
    order = {name: index for index, name in enumerate(vars(module))}
    return sorted({*assigned, *defined}, key=lambda name: order[name])


def entries(target: str, names: list[str], kind: str) -> str:
    """Return the text of names of a module; all public ones if `names` is empty."""
    module = importlib.import_module(target)
    return "\n".join(entry(module, name, kind) for name in names or public_names(module))


def entry(module: ModuleType, name: str, kind: str) -> str:
    """Return the text of one name: its signature, and its docstring ("api") or the first sentence of it ("api-list"),
    or only what the docstring says of the arguments ("arguments").
    """
    value = getattr(module, name)
    value = value.function if isinstance(value, Unit) else value
    if inspect.isclass(value) or inspect.isroutine(value) or inspect.ismodule(value):
        text, shown = inspect.cleandoc(value.__doc__ or "").strip(), signature(name, value)
    else:
        text, assigned = constants(source_of(module, name)).get(name, ("", ""))
        shown = f"{name} = {assigned}" if assigned else name
    if not text:
        raise ValueError(f"{module.__name__}.{name} has no docstring")
    if kind == "api-list":
        return f"* `{shown}`: {line(text.split(chr(10) * 2)[0])}"
    if kind == "arguments":
        return body("\n".join(found[0] for found in SECTION.finditer(text) if found[1] == "Args"))
    made = f"### {name}\n\n`{shown}`\n\n{body(text)}\n"
    if inspect.isclass(value) and (lines := list(members(value))):
        made += "\nMembers:\n\n" + "\n".join(lines) + "\n"
    return made


def source_of(module: ModuleType, name: str) -> ModuleType:
    """Return the module whose source assigns a constant: `module`, or the one that it imports the name from."""
    for node in ast.walk(ast.parse(inspect.getsource(module))):
        if isinstance(node, ast.ImportFrom) and node.module and any((a.asname or a.name) == name for a in node.names):
            return importlib.import_module(node.module)
    return module


@functools.cache
def constants(owner: ModuleType | type) -> dict[str, tuple[str, str]]:
    """Return name -> (the text below its assignment, the assigned code) for the constants and type aliases of a module,
    or the attributes of a class; no code where it has several lines, or several names are assigned at once.
    """
    source = textwrap.dedent(inspect.getsource(owner))
    tree = ast.parse(source)
    found, body = {}, tree.body if inspect.ismodule(owner) else tree.body[0].body
    for node, after in pairwise(body):
        target = node.targets[0] if isinstance(node, ast.Assign) else getattr(node, "target", None)
        names = [each.id for each in getattr(target, "elts", [target]) if isinstance(each, ast.Name)]
        text = after.value if isinstance(after, ast.Expr) else None
        if isinstance(text, ast.Constant) and isinstance(text.value, str):
            value = getattr(node, "value", None) if len(names) == 1 else None
            code = ast.get_source_segment(source, value) or "" if value is not None else ""
            found |= dict.fromkeys(names, (inspect.cleandoc(text.value), "" if "\n" in code else code))
    return found


def signature(name: str, value: Any) -> str:
    """Return how a name is called, as text; the name alone for what takes no arguments of its own."""
    if not (inspect.isroutine(value) or inspect.isclass(value)) or is_without_arguments(value):
        return name
    try:
        found = inspect.signature(value)
    except (TypeError, ValueError):
        return name
    shown, star = [], False
    factories = {field.name: field.default_factory for field in fields(value)}
    for each in found.parameters.values():
        if (each.name in ("self", "cls") and not shown) or each.name.startswith("_"):
            continue
        if each.kind is each.KEYWORD_ONLY and not star:
            shown, star = [*shown, "*"], True
        star = star or each.kind is each.VAR_POSITIONAL
        text = {each.VAR_POSITIONAL: "*", each.VAR_KEYWORD: "**"}.get(each.kind, "") + each.name
        has_type = each.annotation is not each.empty
        text += f": {annotation(each.annotation)}" if has_type else ""
        if each.default is not each.empty:
            default = factories[each.name]() if repr(each.default) == "<factory>" else each.default
            text += f" = {shown_default(default)}" if has_type else f"={shown_default(default)}"
        shown.append(text)
    returned = "" if inspect.isclass(value) or found.return_annotation is found.empty else found.return_annotation
    return f"{name}({', '.join(shown)})" + (f" -> {annotation(returned)}" if returned != "" else "")


def is_without_arguments(value: Any) -> bool:
    """Whether nobody calls a class with arguments of its own, as an exception, an enumeration or a protocol."""
    return inspect.isclass(value) and (
        issubclass(value, BaseException | enum.Enum)
        or typing.is_typeddict(value)
        or getattr(value, "_is_protocol", False)
        or not value.__module__.startswith("diffsynth")
    )


def fields(value: Any) -> tuple[dataclasses.Field[Any], ...]:
    """Return the fields of a dataclass; an empty tuple for anything else."""
    return dataclasses.fields(value) if inspect.isclass(value) and dataclasses.is_dataclass(value) else ()


def annotation(value: Any) -> str:
    """Return a type as text on one line, as the code writes it."""
    text = value if isinstance(value, str) else inspect.formatannotation(value)
    return " ".join(text.replace("NoneType", "None").split())


def shown_default(value: Any) -> str:
    """Return a default as text that does not depend on the process."""
    if inspect.isroutine(value) or inspect.isclass(value):
        return value.__name__
    if isinstance(value, enum.Enum):
        return f"{type(value).__name__}.{value.name}"
    if type(value).__name__ == "mappingproxy":
        return repr(dict(value))
    text = repr(value)
    return f"{type(value).__name__}(...)" if " at 0x" in text else text


def members(cls: type) -> Iterator[str]:
    """Yield a line for each public method and property of a class and of those of our bases, once."""
    seen: set[str] = set()
    if issubclass(cls, enum.Enum):
        yield f"* {', '.join(f'`{each.name}`' for each in cls)}"
    for base in (base for base in cls.__mro__ if base.__module__.startswith("diffsynth")):
        for name, (text, _) in constants(base).items():
            if name not in seen and not name.startswith("_"):
                seen.add(name)
                yield f"* `{name}`: {line(text)}"
        for name, value in vars(base).items():
            code = value.fget if isinstance(value, property) else getattr(value, "__func__", value)
            text = inspect.getdoc(code) if inspect.isroutine(code) else None
            if name in seen or (name.startswith("_") and name != "__call__") or not text:
                continue
            seen.add(name)
            shown = name if isinstance(value, property) else signature(name, code)
            yield f"* `{shown}`: {line(text.split(chr(10) * 2)[0])}"


def body(text: str) -> str:
    """Return a docstring as Markdown: paragraphs, then a list of the arguments, the result and the errors."""
    made = []
    start = SECTION.search(text)
    before = text[: start.start()] if start else text
    made.append("\n\n".join(map(paragraph, before.strip().split("\n\n"))))
    for title, content in SECTION.findall(text):
        found = ENTRY.findall(content)
        if title in ("Returns", "Yields") or not found:
            made.append(f"{title}: {line(content)}")
            continue
        lines = [f"* `{names.replace(', ', '`, `')}`: {line(said)}" for names, said in found]
        made.append(("Raises:\n\n" if title == "Raises" else "") + "\n".join(lines))
    return "\n\n".join(made)


def paragraph(text: str) -> str:
    """Return a paragraph of a docstring as Markdown: code as it is, an item of a list on one line, else one line."""
    if text.startswith(" "):
        return text
    items = re.split(r"^[*-] ", text, flags=re.MULTILINE)
    lines = [line(items[0]), *(f"* {line(item)}" for item in items[1:])]
    return "\n".join(each for each in lines if each)


def line(text: str) -> str:
    """Return a text on one line, with the characters escaped that Markdown would read as marks."""
    parts = CODE.split(" ".join(text.split()))
    return "".join(
        part if index % 2 else re.sub(r"(?<!\w)_|_(?!\w)", r"\\_", part.replace("*", r"\*").replace("<", "&lt;"))
        for index, part in enumerate(parts)
    )


def units(target: str) -> str:
    """Return a table of the units of a pipeline class in running order, those after the loop last."""
    pipeline = resolve(target)
    made = compose(pipeline)
    owner = {each: feature.name for feature in made.features for each in (*feature.units, *feature.outputs)}
    lines = ["| phase | unit | of the feature | roles | writes |", "|---|---|---|---|---|"]
    for when, steps in (("", made.program.units), ("after the loop", made.program.outputs)):
        for step in steps:
            roles = ", ".join(f"`{role}`" for role in (*step.roles, *step.requires))
            writes = ", ".join(f"`{name}`" for name in step.writes)
            lines.append(f"| {when or step.phase.name} | `{step.name}` | {owner.get(step, '')} | {roles} | {writes} |")
    return "\n".join(lines)


def main() -> None:
    """Write the generated parts of all pages."""
    for page in pages():
        text = page.read_text(encoding="utf-8")
        page.write_text(rewritten(text), encoding="utf-8")
    sys.stdout.write(f"{len(pages())} pages\n")


if __name__ == "__main__":
    main()
