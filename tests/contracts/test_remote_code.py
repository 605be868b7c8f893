"""Code that comes with a model is never run: every call that could run it says so."""

import ast
from pathlib import Path

import pytest

from documented import blocks

ROOT = Path(__file__).parents[2]
SOURCES = sorted(
    path
    for folder in ("packages", "examples", "benchmarks", "tools", "tests")
    for path in (ROOT / folder).rglob("*.py")
    if ".venv" not in path.parts
)
OUR_CLASSES = ("Pipeline", "pipeline", "super()", "cls", "resolve(record.pipeline)", "ToyPipeline')")
WITHOUT_CODE = ("_detector_class(processor_id)",)
"""Classes of other libraries that have a `from_pretrained` and run no code of a repository: those of controlnet_aux."""

RUNS_CODE = {"from_pretrained", "load_dataset"}
"""Names of functions of transformers and the hubs that run code of a repository if they are allowed to."""


def unsafe_calls(tree: ast.AST) -> list[int]:
    """Return the lines of calls that may run a repository's code, and do not forbid it."""
    found = []
    for node in ast.walk(tree):
        if not isinstance(node, ast.Call):
            continue
        name = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
        keywords = {keyword.arg: keyword.value for keyword in node.keywords}
        trusted = keywords.get("trust_remote_code")
        allows = trusted is not None and ast.unparse(trusted) != "False"
        does_not_say = trusted is None and name in RUNS_CODE and not _is_ours(node.func)
        if allows or does_not_say or ast.unparse(node.func).startswith("torch.hub."):
            found.append(node.lineno)
    return found


def _is_ours(function: ast.expr) -> bool:
    if not isinstance(function, ast.Attribute):
        return False
    receiver = ast.unparse(function.value)
    return (
        receiver.endswith((*OUR_CLASSES, *WITHOUT_CODE))
        or "record.pipeline" in receiver
        or "getattr(importlib" in receiver
    )


@pytest.mark.parametrize(
    ("code", "is_unsafe"),
    [
        ("AutoTokenizer.from_pretrained(folder)", True),
        ("AutoTokenizer.from_pretrained(folder, trust_remote_code=True)", True),
        ("AutoTokenizer.from_pretrained(folder, trust_remote_code=allowed)", True),
        ("AutoTokenizer.from_pretrained(folder, trust_remote_code=False)", False),
        ("resolve(processor.loader).from_pretrained(folder, local_files_only=True)", True),
        ("ZImagePipeline.from_pretrained(model_configs=[])", False),
        ("super().from_pretrained()", False),
        ("snapshot_download('a/b', trust_remote_code=True)", True),
        ("torch.hub.load('a/b', 'c')", True),
        ("torch.load(file)", False),
    ],
)
def test_what_counts_as_unsafe(code, is_unsafe):
    assert bool(unsafe_calls(ast.parse(code))) == is_unsafe


def test_no_call_may_run_code_of_a_model():
    texts = {path: path.read_text(encoding="utf-8") for path in SOURCES}
    found = [
        f"{path.relative_to(ROOT)}:{line}"
        for path, text in texts.items()
        if any(name in text for name in (*RUNS_CODE, "trust_remote_code", "torch.hub"))
        for line in unsafe_calls(ast.parse(text))
    ]
    assert not found, "pass trust_remote_code=False:\n" + "\n".join(found)


def test_no_code_block_of_the_manual_may_either():
    pages = [ROOT / "README.md", *(ROOT / "docs").rglob("*.md")]
    found = []
    for page in pages:
        for _, language, code in blocks(page.read_text(encoding="utf-8")):
            if language == "python":
                try:
                    tree = ast.parse(code)
                except SyntaxError:
                    continue  # other tests run the blocks
                found += [f"{page.relative_to(ROOT)}: {line}" for line in unsafe_calls(tree)]
    assert not found, "\n".join(found)
