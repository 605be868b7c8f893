"""The dataset's rows: csv, json or jsonl, always UTF-8."""

from __future__ import annotations

import csv
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from diffsynth.errors import TrainingError

_SHOWN = 10


@dataclass(frozen=True)
class Manifest:
    """Rows as they stand in the file, and the folder that their paths are relative to."""

    path: Path
    rows: tuple[Mapping[str, Any], ...]

    @property
    def folder(self) -> Path:
        """Where relative paths start."""
        return self.path.parent

    def __len__(self) -> int:
        return len(self.rows)

    def file(self, index: int, column: str) -> Path:
        """The file that a row names in a column."""
        return self.folder / str(self.rows[index][column])


def read_manifest(path: Path, *, columns: Iterable[str], files: Iterable[str]) -> Manifest:
    """Read and check a manifest.

    Args:
        path: .csv with a header line, .json with a list of objects, or .jsonl with an object per line.
        columns: that every row must have.
        files: those of them that name files; all must be there.

    Raises:
        TrainingError: unreadable, empty, a column missing, or files missing; all missing files are counted, the first
            ten are named.
    """
    rows = tuple(_read_rows(path))
    if not rows:
        raise TrainingError(f"manifest {path} has no rows")
    for number, row in enumerate(rows, start=1):
        absent = [column for column in columns if row.get(column) is None]
        if absent:
            raise TrainingError(
                f"manifest {path}, row {number} lacks {', '.join(map(repr, absent))}; it has {', '.join(row)}"
            )
    manifest = Manifest(path, rows)
    wanted = [manifest.file(index, column) for index in range(len(rows)) for column in files]
    missing = [str(file) for file in wanted if not file.is_file()]
    if missing:
        more = f" and {len(missing) - _SHOWN} more" if len(missing) > _SHOWN else ""
        raise TrainingError(
            f"manifest {path}: {len(missing)} of {len(wanted)} files are missing: {', '.join(missing[:_SHOWN])}{more}"
        )
    return manifest


def _read_rows(path: Path) -> list[Mapping[str, Any]]:
    readers = {".csv": _read_csv, ".json": _read_json, ".jsonl": _read_jsonl}
    if path.suffix not in readers:
        raise TrainingError(f"manifest {path}: expected {', '.join(readers)}, got {path.suffix or 'no suffix'!r}")
    if not path.is_file():
        raise TrainingError(f"manifest {path} does not exist")
    try:
        return readers[path.suffix](path)
    except (json.JSONDecodeError, csv.Error, UnicodeDecodeError) as error:
        raise TrainingError(f"manifest {path} cannot be read as UTF-8 {path.suffix[1:]}: {error}") from error


def _read_csv(path: Path) -> list[Mapping[str, Any]]:
    # utf-8-sig: spreadsheets put a byte order mark before the first column's name.
    with path.open(encoding="utf-8-sig", newline="") as file:
        return list(csv.DictReader(file))


def _read_json(path: Path) -> list[Mapping[str, Any]]:
    content = json.loads(path.read_text(encoding="utf-8"))
    if not isinstance(content, list) or not all(isinstance(row, dict) for row in content):
        raise TrainingError(f"manifest {path}: expected a list of objects")
    return content


def _read_jsonl(path: Path) -> list[Mapping[str, Any]]:
    lines = [line for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    return [json.loads(line) for line in lines]
