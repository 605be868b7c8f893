"""The progress bar that a call shows unless it is given another."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import TypeVar

Item = TypeVar("Item")


def progress_bar(items: Iterable[Item], *, description: str = "denoise", total: float | None = None) -> Iterator[Item]:
    """Yield the items behind a rich bar on stderr; silent where stderr is no terminal.

    Args:
        items: what is worked on, one by one.
        description: stands before the bar.
        total: how many there are, where `len(items)` does not say.
    """
    from rich.console import Console
    from rich.progress import track

    console = Console(stderr=True)
    bar = {"console": console, "disable": not console.is_terminal, "transient": True}
    yield from track(items, description=description, total=total, **bar)


def no_progress(items: Iterable[Item]) -> Iterable[Item]:
    """Show nothing: `pipe(..., progress_bar_cmd=no_progress)`."""
    return items
