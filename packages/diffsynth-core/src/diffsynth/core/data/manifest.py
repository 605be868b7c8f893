"""Reading of the rows of a dataset's table: csv, json or jsonl in UTF-8."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

from diffsynth.errors import TrainingError

_ENCODING = "utf-8-sig"
"""Spreadsheets and editors put a byte order mark before the first character."""


def read_rows(path: Path) -> list[dict[str, Any]]:
    """Return the rows of a csv, json or jsonl table as a list of dicts column -> value; the values of a csv are text,
    not converted.

    Args:
        path: a .csv with a header line, a .json with a list of objects, or a .jsonl with an object per line.

    Raises:
        TrainingError: another suffix, a missing file, or one that cannot be parsed.
    """
    readers = {".csv": _read_csv, ".json": _read_json, ".jsonl": _read_jsonl}
    if path.suffix not in readers:
        raise TrainingError(f"manifest {path}: expected {', '.join(readers)}, got {path.suffix or 'no suffix'!r}")
    if not path.is_file():
        raise TrainingError(f"manifest {path} does not exist")
    try:
        rows = readers[path.suffix](path)
    except (json.JSONDecodeError, csv.Error, UnicodeDecodeError) as error:
        raise TrainingError(f"manifest {path} cannot be read as UTF-8 {path.suffix[1:]}: {error}") from error
    if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
        raise TrainingError(f"manifest {path}: expected a list of objects")
    return rows


def _read_csv(path: Path) -> Any:
    with path.open(encoding=_ENCODING, newline="") as file:
        rows = list(csv.DictReader(file))
    for number, row in enumerate(rows, start=1):
        if None in row:
            raise csv.Error(f"row {number} has more cells than the header; quote texts with commas")
    return rows


def _read_json(path: Path) -> Any:
    return json.loads(path.read_text(encoding=_ENCODING))


def _read_jsonl(path: Path) -> Any:
    # Not splitlines(), which also breaks at separators that are allowed within a JSON text, such as U+2028.
    lines = [line for line in path.read_text(encoding=_ENCODING).split("\n") if line.strip()]
    return [json.loads(line) for line in lines]
