"""Find and parse our source files, for tests that read code instead of running it."""

from __future__ import annotations

import ast
import functools
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parents[2]
SOURCES = {path.parent.name: path for path in sorted(ROOT.glob("packages/*/src/*/__init__.py"))}
"""Import name -> its `__init__.py`."""

FAMILIES = tuple(name for name in SOURCES if name not in ("diffsynth", "diffsynth_train"))

LAYERS = ("light", "tensors", "models", "loading", "runtime", "top")
"""Inside core, each may import only itself and those before it."""

_LIGHT_FILES = {"__init__", "plugin", "config", "checkpoints", "convert"}
_LIGHT = {
    ".": {
        *("__init__", "errors", "spec", "hookspecs", "registry", "configs", "metrics", "terminal", "parameters_text"),
        *("_discovery", "_entry_points", "_env", "_models"),
        *("_plain_values", "_plugin_loading", "_process_state", "_spec_checks"),
    },
    "core": {"__init__", "arguments", "json_cache", "paths", "progress", "replacing"},
    "core/quant": {"__init__", "config"},
    "core/loader": {
        *("__init__", "config", "convert", "download", "dtypes", "explain", "file_kinds", "files", "first_party"),
        *(
            "header",
            "identity",
            "key_differences",
            "layouts",
            "lora_bases",
            "lora_keys",
            "lora_match",
            "quantization_notes",
            "recognize",
            "scaled",
        ),
        "shapes",
    },
    "compat": {"__init__", "doors"},
    "models": _LIGHT_FILES,
}
_FOLDERS = {
    "core/attention": "tensors",
    "core/gradient": "tensors",
    "core/device": "tensors",
    "core/data": "tensors",
    "core/parallel": "tensors",
    "core/finite": "tensors",
    "core/forward_chain": "tensors",
    "core/repeats": "tensors",
    "core/torch_defaults": "tensors",
    "nn": "tensors",
    "sampling": "tensors",
    "models": "models",
    "core/loader": "loading",
    "core/vram": "loading",
    "core/planning": "loading",
    "core/quant": "loading",
    "core/lora": "loading",
    "runtime": "runtime",
    "pipelines": "runtime",
    "utils": "runtime",
    "diffusion": "runtime",
    "parameters_text": "runtime",
    "provenance": "runtime",
    "cli": "top",
    "compat": "top",
    "diagnosis": "top",
    "testing": "top",
}


@functools.cache
def modules() -> dict[str, Path]:
    """Return dotted name -> file of every module in our packages."""
    found = {}
    for package, init in SOURCES.items():
        for file in sorted(init.parent.rglob("*.py")):
            parts = file.relative_to(init.parent).with_suffix("").parts
            parts = parts[:-1] if parts[-1] == "__init__" else parts
            found[".".join((package, *parts))] = file
    return found


@functools.cache
def syntax_tree(file: Path) -> ast.Module:
    """Return the parsed file; parsed once for all contract tests of a process."""
    return ast.parse(file.read_text(encoding="utf-8"))


def layer(name: str) -> str:
    """Return the layer of a core module.

    Raises:
        AssertionError: the module is in no folder that a layer lists.
    """
    inside = modules()[name].relative_to(SOURCES["diffsynth"].parent).with_suffix("").as_posix()
    if is_light(name):
        return "light"
    for folder, its_layer in _FOLDERS.items():
        if inside == folder or inside.startswith(f"{folder}/"):
            return its_layer
    raise AssertionError(f"{name} belongs to no layer: move it, or list its folder in tests/support/source_tree.py")


def is_light(name: str) -> bool:
    """Whether a module must not import torch."""
    package = name.split(".")[0]
    inside = modules()[name].relative_to(SOURCES[package].parent)
    folder, stem = inside.parent.as_posix(), inside.stem
    if package == "diffsynth_train":
        return folder == "." and stem in ("__init__", "plugin")
    if package != "diffsynth":
        return folder == "." and stem in _LIGHT_FILES
    return stem in _LIGHT.get(folder, ())


def imports(name: str, *, for_type_checkers: bool = False) -> Iterator[tuple[str, int]]:
    """Yield (module of ours, line) for every import in a module, inside functions too.

    Args:
        name: dotted name of the module.
        for_type_checkers: whether imports under `if TYPE_CHECKING:` count.
    """
    tree = syntax_tree(modules()[name])
    skipped = set()
    if not for_type_checkers:
        blocks = [node for node in ast.walk(tree) if isinstance(node, ast.If) and _is_for_type_checkers(node.test)]
        skipped = {id(inner) for block in blocks for statement in block.body for inner in ast.walk(statement)}
    for node in ast.walk(tree):
        if id(node) in skipped:
            continue
        if isinstance(node, ast.Import):
            yield from ((alias.name, node.lineno) for alias in node.names if _is_ours(alias.name))
        elif isinstance(node, ast.ImportFrom) and node.module and _is_ours(node.module):
            for alias in node.names:
                inner = f"{node.module}.{alias.name}"
                yield (inner if inner in modules() else node.module), node.lineno


def _is_for_type_checkers(test: ast.expr) -> bool:
    return "TYPE_CHECKING" in (getattr(test, "id", ""), getattr(test, "attr", ""))


def _is_ours(name: str) -> bool:
    return name.split(".")[0] in SOURCES
