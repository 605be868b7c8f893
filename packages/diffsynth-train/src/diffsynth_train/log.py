"""Progress output of a training run: a progress bar and `loss.csv`."""

from __future__ import annotations

import csv
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from torch import Tensor

from diffsynth.core.replacing import replacing
from diffsynth.terminal import unescaped


class LossLog:
    """CSV log of mean metrics over groups of steps; a resumed run continues the file.

    Args:
        path: path of the CSV file.
        every: steps per row.
        start: steps done before a resume; later rows, of an interrupted run, are removed.
    """

    def __init__(self, path: Path, *, every: int, start: int = 0) -> None:
        self._path = path
        self._every = max(every, 1)
        self._sums: dict[str, list[Tensor | float]] = {}
        self._start_time = time.perf_counter()
        self._rows = [row for row in _read(path) if int(row["step"]) <= start] if start else []
        self._seconds = float(self._rows[-1]["seconds"]) if self._rows else 0.0
        path.parent.mkdir(parents=True, exist_ok=True)
        self._rewrite()

    def add(self, step: int, values: Mapping[str, Tensor | float]) -> dict[str, float] | None:
        """Add the metrics of a step; at every `every`-th step, also write their means since the last row, NaN left out,
        to the CSV file and return a dict metric -> mean, else None.

        Means ignore NaN values; `step` is the number of steps done.
        """
        for name, value in values.items():
            self._sums.setdefault(name, []).append(value)
        if step % self._every:
            return None
        # float() synchronises with the device; doing it once per row keeps the device busy between rows.
        means = {name: _mean([float(value) for value in several]) for name, several in self._sums.items()}
        self._sums = {}
        seconds = self._seconds + time.perf_counter() - self._start_time
        row = {"step": str(step), "seconds": f"{seconds:.1f}"} | {name: f"{mean:.6g}" for name, mean in means.items()}
        self._rows.append(row)
        self._append(row)
        return means

    def _rewrite(self) -> None:
        with replacing(self._path) as partial, partial.open("w", encoding="utf-8", newline="") as file:
            if self._rows:
                writer = csv.DictWriter(file, fieldnames=list(self._rows[0]))
                writer.writeheader()
                writer.writerows(self._rows)

    def _append(self, row: Mapping[str, str]) -> None:
        with self._path.open("a", encoding="utf-8", newline="") as file:
            writer = csv.DictWriter(file, fieldnames=list(row))
            if len(self._rows) == 1:
                writer.writeheader()
            writer.writerow(row)


@contextmanager
def training_progress(total: int, done: int) -> Iterator[Progress]:
    """Context manager that yields a `Progress` bar on stderr with one task of `total` steps, `done` of them completed;
    nothing is shown without a terminal.
    """
    console = Console(file=unescaped(sys.stderr))
    columns = (
        TextColumn("train"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[loss]}"),
    )
    with Progress(*columns, console=console, disable=not console.is_terminal) as progress:
        progress.add_task("train", total=total, completed=done, loss="")
        yield progress


def _mean(values: list[float]) -> float:
    known = [value for value in values if value == value]
    return sum(known) / len(known) if known else float("nan")


def _read(path: Path) -> list[dict[str, str]]:
    if not path.is_file():
        return []
    with path.open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))
