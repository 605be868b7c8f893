"""Pages of the manual as data: their sections, and the files that their code blocks are."""

from __future__ import annotations

import re
from collections.abc import Iterator

_BLOCK = re.compile(r"(?:^`(?P<file>[\w./-]+)`\n\n)?^```(?P<language>\w+)\n(?P<text>.*?)^```", re.MULTILINE | re.DOTALL)


def sections(text: str) -> dict[str, str]:
    """Title of each second-level heading -> what stands under it."""
    parts = re.split(r"^## (.+)\n", text, flags=re.MULTILINE)
    return dict(zip(parts[1::2], parts[2::2], strict=True))


def blocks(text: str) -> Iterator[tuple[str, str, str]]:
    """(file, language, text) of each code block; the file stands in a line of its own before it, or is empty."""
    for match in _BLOCK.finditer(text):
        yield match["file"] or "", match["language"], match["text"]


def file_blocks(text: str, *, unnamed: str) -> Iterator[tuple[str, str]]:
    """(file, text) of each code block; `unnamed` is the file of those that name none."""
    for file, _, content in blocks(text):
        yield file or unnamed, content
