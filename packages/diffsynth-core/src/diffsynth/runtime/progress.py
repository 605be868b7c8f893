"""The progress bar that a call shows unless `progress_bar_cmd` names another."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import TypeVar

Item = TypeVar("Item")


def progress_bar(items: Iterable[Item], *, description: str = "denoise", total: float | None = None) -> Iterator[Item]:
    """Yield the items and show a rich progress bar on stderr; nothing is shown where stderr is no terminal.

    Args:
        items: the steps.
        description: text before the bar.
        total: number of items, if `len(items)` is not known.
    """
    import sys

    if not sys.stderr.isatty():
        yield from items
        return
    from rich.console import Console
    from rich.progress import track

    from diffsynth.errors import printable
    from diffsynth.terminal import unescaped

    bar = {"console": Console(file=unescaped(sys.stderr)), "transient": True}
    yield from track(items, description=printable(description), total=total, **bar)


def no_progress(items: Iterable[Item]) -> Iterable[Item]:
    """Return the items unchanged, so that no progress bar is shown: `pipe(..., progress_bar_cmd=no_progress)`."""
    return items
