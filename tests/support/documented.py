"""Parse pages of the manual: their sections and their code blocks."""

from __future__ import annotations

import re
from collections.abc import Iterator

_BLOCK = re.compile(r"(?:^`(?P<file>[\w./-]+)`\n\n)?^```(?P<language>\w+)\n(?P<text>.*?)^```", re.MULTILINE | re.DOTALL)


def sections(text: str) -> dict[str, str]:
    """Return title of each second-level heading -> the text under it."""
    parts = re.split(r"^## (.+)\n", text, flags=re.MULTILINE)
    return dict(zip(parts[1::2], parts[2::2], strict=True))


def blocks(text: str) -> Iterator[tuple[str, str, str]]:
    """Yield (file, language, text) of each code block.

    The file is named on a line of its own before the block, as `name`; it is "" where there is no such line.
    """
    for match in _BLOCK.finditer(text):
        yield match["file"] or "", match["language"], match["text"]


def file_blocks(text: str, *, unnamed: str) -> Iterator[tuple[str, str]]:
    """Yield (file, text) of each code block; `unnamed` is the file of blocks that name none."""
    for file, _, content in blocks(text):
        yield file or unnamed, content
