"""The line on the terminal that shows the progress of a load or call."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from diffsynth.core.progress import Progress
from diffsynth.errors import printable
from diffsynth.terminal import unescaped


@contextmanager
def progress_line(text: str) -> Iterator[Callable[[Progress], None] | None]:
    """Context manager that shows a bar on stderr and removes it at the end; it yields a function that takes the
    `Progress` to show, or None where stderr is no terminal and nothing is shown.

    Args:
        text: shown before the first report.
    """
    if not sys.stderr.isatty():
        yield None
        return
    from rich.console import Console
    from rich.progress import BarColumn, TextColumn
    from rich.progress import Progress as Bars

    columns = (TextColumn("{task.description}", markup=False), BarColumn(), TextColumn("{task.fields[amount]}"))
    with Bars(*columns, console=Console(file=unescaped(sys.stderr)), transient=True) as bars:
        bar = bars.add_task(printable(text), total=None, amount="")

        def show(progress: Progress) -> None:
            description = " ".join(filter(None, (progress.cascade_stage, progress.stage, progress.description)))
            bars.update(
                bar,
                description=printable(description),
                completed=progress.done,
                total=progress.total,
                amount=amount(progress),
            )

        yield show


def amount(progress: Progress) -> str:
    """Return the finished and all units of a report as text, such as "3 of 8 steps" or "1.5 of 6.0 GiB"."""
    done, total, unit = progress.done, progress.total, progress.unit
    if unit != "bytes":
        return f"{done} {unit}" if total is None else f"{done} of {total} {unit}"
    largest = done if total is None else total
    size, name = next((each for each in ((2**30, "GiB"), (2**20, "MiB")) if largest >= each[0]), (2**10, "KiB"))
    return f"{done / size:.1f} {name}" if total is None else f"{done / size:.1f} of {total / size:.1f} {name}"
