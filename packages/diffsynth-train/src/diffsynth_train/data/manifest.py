"""Reading of the dataset's manifest, with checks that all columns and files exist."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from diffsynth.core.data.manifest import read_rows
from diffsynth.errors import TrainingError, shortened


@dataclass(frozen=True)
class Manifest:
    """Rows of a manifest file; paths in them are relative to the file's folder."""

    path: Path
    rows: tuple[Mapping[str, Any], ...]

    @property
    def folder(self) -> Path:
        """Path of the folder of the manifest (dataset file); paths in its rows are relative to this folder."""
        return self.path.parent

    def __len__(self) -> int:
        return len(self.rows)

    def file(self, index: int, column: str) -> Path:
        """Return the path of the file that row `index` (from 0) names in `column`; relative names start at the
        manifest's folder.
        """
        return self.folder / str(self.rows[index][column])


def read_manifest(path: Path, *, columns: Iterable[str], files: Iterable[str]) -> Manifest:
    """Return a `Manifest` with the rows of a dataset file, after a check that each row has all `columns` and that all
    files named in the columns `files` exist.

    Args:
        path: .csv with a header line, .json with a list of objects, or .jsonl with an object per line.
        columns: columns that every row must have.
        files: the columns that name files; all files must exist.

    Raises:
        TrainingError: the manifest is unreadable or empty, or columns or files are missing; all missing files are
            counted, the first ten are named.
    """
    rows = tuple(read_rows(path))
    if not rows:
        raise TrainingError(f"manifest {path} has no rows")
    for number, row in enumerate(rows, start=1):
        absent = [column for column in columns if row.get(column) is None]
        if absent:
            filled = [name for name, value in row.items() if name is not None and value is not None]
            raise TrainingError(
                f"manifest {path}, row {number} lacks {', '.join(map(repr, absent))}; it has {', '.join(filled)}"
            )
    manifest = Manifest(path, rows)
    wanted = [manifest.file(index, column) for index in range(len(rows)) for column in files]
    missing = [str(file) for file in wanted if not file.is_file()]
    if missing:
        raise TrainingError(
            f"manifest {path}: {len(missing)} of {len(wanted)} files are missing: {shortened(missing, 10)}"
        )
    return manifest
