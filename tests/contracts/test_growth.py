"""Limits on the length of modules and functions. They are stops; what to aim at stands in CONTRIBUTING.md.

There is no limit on the number of files in a folder: a file is one idea, and is not split to fit a limit.
"""

import ast

import pytest

from source_tree import ROOT, SOURCES, modules, syntax_tree

MODULE, ARCHITECTURE, SHORT = 600, 800, 200
FUNCTION, FORWARD, PARAMETERS = 60, 80, 10

ARCHITECTURES = {"dit.py", "vae.py", "text_encoder.py"}
SHORTER = {"plugin.py", "hookspecs.py"}

EXEMPT: dict[str, str] = {
    "diffsynth.core.attention.forward:attention_forward": "the arguments that users' code passes it",
    "diffsynth.compat.attention:flash_attention_2": "the arguments that users' code passes it",
    "diffsynth.compat.attention:flash_attention_3": "the arguments that users' code passes it",
    "diffsynth.compat.attention:flash_attention_4": "the arguments that users' code passes it",
    "diffsynth.compat.attention:flex_attention": "the arguments that users' code passes it",
    "diffsynth.compat.attention:torch_sdpa_sliding_window": "the arguments that users' code passes it",
    "diffsynth.compat.load_model:load_model": "the arguments that users' code passes it",
    "diffsynth.runtime.load:load": "the choices of users who load a model, each by its own name",
}
"""`module` or `module:function` -> reason."""


@pytest.mark.parametrize("name", modules())
def test_module_length(name):
    file = modules()[name]
    limit = SHORT if file.name in SHORTER else ARCHITECTURE if file.name in ARCHITECTURES else MODULE
    lines = len(file.read_text(encoding="utf-8").splitlines())
    assert lines <= limit or name in EXEMPT, f"{file.relative_to(ROOT)} has {lines} lines, limit {limit}"


@pytest.mark.parametrize("name", modules())
def test_functions(name):
    for node in ast.walk(syntax_tree(modules()[name])):
        if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) or f"{name}:{node.name}" in EXEMPT:
            continue
        limit = FORWARD if node.name == "forward" else FUNCTION
        assert length(node) <= limit, f"{name}:{node.lineno} {node.name} has {length(node)} lines, limit {limit}"
        count = 0 if is_kernel(node) else len(parameters(node))
        assert count <= PARAMETERS, f"{name}:{node.lineno} {node.name} has {count} parameters, limit {PARAMETERS}"


def length(node: ast.FunctionDef | ast.AsyncFunctionDef) -> int:
    """Return the number of lines without the docstring; for a kernel, without its parameters either."""
    docstring = node.body[0] if ast.get_docstring(node) is not None else None
    spared = docstring.end_lineno - docstring.lineno + 1 if docstring is not None else 0
    first = node.body[0].lineno if is_kernel(node) else node.lineno
    return node.end_lineno - first + 1 - spared


def is_kernel(node: ast.FunctionDef | ast.AsyncFunctionDef) -> bool:
    """Whether it is a Triton kernel, which takes each pointer and each stride as a parameter of its own."""
    return any("triton.jit" in ast.unparse(decorator) for decorator in node.decorator_list)


def parameters(node: ast.FunctionDef | ast.AsyncFunctionDef) -> list[str]:
    every = [*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs]
    return [argument.arg for argument in every if argument.arg not in ("self", "cls")]


def test_exemptions_are_still_there():
    for name in EXEMPT:
        assert name.partition(":")[0] in modules(), f"{name} is exempt but gone"


def test_every_package_says_it_is_typed():
    assert [name for name, init in SOURCES.items() if not (init.parent / "py.typed").exists()] == []
