"""Docstrings begin with a plain sentence, and texts use the words of the field rather than words of our own."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from source_tree import ROOT, syntax_tree

OPENINGS = ("At once", "From", "How", "In which", "Of", "That", "What", "Where", "Which", "Who", "Whose")
"""Words that no docstring begins with: a noun or a verb says sooner what a function returns or does."""

OPENING = re.compile(rf"({'|'.join(OPENINGS)})\b")

WORDS = {
    "allowances?": "byte budget",
    "arenas?": "pinned pool",
    "(comes?|came|coming) and (go(es)?|went|going)": "is moved, is streamed",
    "crews?": "workers",
    "(goes|went) there": "is moved to the device",
    "handovers?": "overlapped swap",
    "heralds?": "file prefetcher",
    "(has|have) the last word": "overrides",
    "(is|are) away": "is offloaded",
    "keepers?": "cache",
    "learns?|learnt": "is trained; reads",
    "ledgers?": "allocation tracker",
    "masters?": "block weights",
    "occupants?": "loaded modules",
    "of no account": "is ignored",
    "on (its|their) way": "is being copied",
    "page locked|page locking": "pinned",
    "pictures?": "image, video",
    "placing": "memory options",
    "rehears(al|als|e|es|ed|ing)": "meta trace",
    "residenc(e|es|y|ies)": "component plan, stage offloader",
    "sets out": "starts",
    "stand ins?": "fake, meta component",
    "strangers?": "third party",
    "twins?": "reference implementation; copy",
    "whoever": "the caller, the code that",
}
"""Word that is ours alone -> what to write instead."""

RENAMED = "lists the old names of what was renamed"

EXEMPT: dict[tuple[str, str], str] = {
    ("CHANGELOG.md", "handover"): RENAMED,
    ("CHANGELOG.md", "occupants"): RENAMED,
    ("CHANGELOG.md", "rehearsal"): RENAMED,
    ("CHANGELOG.md", "residences"): RENAMED,
    ("examples/train_from_scratch/evaluate.py", "picture"): "a key of the published evaluation.json of z-image-nano",
    (
        "examples/train_from_scratch/make_tokenizer.py",
        "picture",
    ): "a phrase of captions, which the tokenizer is made for",
    ("tests/support/processes.py", "master"): "MASTER_ADDR and MASTER_PORT are torch's names",
    **{
        (path, "picture"): "the published text before each image of a list"
        for path in (
            "docs/models/qwen-image.md",
            "packages/diffsynth-qwen-image/src/diffsynth_qwen_image/features/edit.py",
            "tests/qwen_image/features/test_edit.py",
        )
    },
}
"""(file, matched text in lower case) -> reason why it is the right word there."""

PATTERN = re.compile(rf"(?<![a-z])(?:{'|'.join(f'(?:{word})' for word in WORDS)})(?![a-z])".replace(" ", r"[\s_-]+"))
FOLDERS = ("benchmarks", "docs", "examples", "packages", "tests", "tools")
SUFFIXES = {".md", ".py", ".sh", ".template"}


def texts() -> list[Path]:
    """Return the files of text that we write: code, pages, scripts and templates."""
    inside = [path for folder in FOLDERS for path in sorted((ROOT / folder).rglob("*")) if path.suffix in SUFFIXES]
    found = [*sorted(ROOT.glob("*.md")), *inside]
    return [
        path for path in found if path != Path(__file__) and not {".venv", "safetensors"} & set(path.name.split("."))
    ]


def test_docstrings_begin_with_a_plain_sentence():
    found = [
        f"{path.relative_to(ROOT)}:{line}: {text.splitlines()[0]}"
        for path in texts()
        if path.suffix == ".py"
        for text, line in docstrings(syntax_tree(path))
        if OPENING.match(text)
    ]
    assert not found, "these docstrings begin otherwise:\n" + "\n".join(found)


def test_texts_use_the_words_of_the_field():
    found = [
        f"{path.relative_to(ROOT)}:{line}: {word!r}"
        for path in texts()
        for word, line in private_words(path.read_text(encoding="utf-8"))
        if (path.relative_to(ROOT).as_posix(), word) not in EXEMPT
    ]
    assert not found, "these words have one of the field in their place:\n" + "\n".join(found)


def test_exemptions_are_needed():
    for name, word in EXEMPT:
        there = {found for found, _ in private_words((ROOT / name).read_text(encoding="utf-8"))}
        assert word in there, f"{name} does not say {word!r} any more"


@pytest.mark.parametrize(
    "text", ["a herald", "HERALD", "_naive_twin", "stand-in", "a stand in", "sets\n  out", "Twins"]
)
def test_private_words_are_found(text):
    assert len(list(private_words(text))) == 1


@pytest.mark.parametrize("text", ["heraldry", "screw", "between", "a place", "sets the output", "standing"])
def test_other_words_are_not(text):
    assert list(private_words(text)) == []


def private_words(text: str) -> Iterator[tuple[str, int]]:
    """Yield (word, line) for each word of ours in a text."""
    for match in PATTERN.finditer(text.lower()):
        yield " ".join(re.split(r"[\s_-]+", match[0])), text.count("\n", 0, match.start()) + 1


def docstrings(tree: ast.AST) -> Iterator[tuple[str, int]]:
    """Yield (text, line) for the docstrings of modules, classes, functions and attributes."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str):
            yield node.value.value.strip(), node.lineno
