"""The progress bar that a call shows unless it is given another."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import TypeVar

Item = TypeVar("Item")


def progress_bar(items: Iterable[Item]) -> Iterator[Item]:
    """Yield the items behind a rich bar on stderr; silent where stderr is no terminal."""
    from rich.console import Console
    from rich.progress import track

    console = Console(stderr=True)
    yield from track(items, description="denoise", console=console, disable=not console.is_terminal, transient=True)


def no_progress(items: Iterable[Item]) -> Iterable[Item]:
    """Show nothing: `pipe(..., progress_bar_cmd=no_progress)`."""
    return items
