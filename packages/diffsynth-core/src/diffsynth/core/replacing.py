"""Writing files so that a crash, a full disk or a power cut leaves the old content or the new one, whole. No torch.

Each file is written under a temporary name in the same folder, synced to disk and renamed; then the folder is synced.
The temporary names begin with a dot and are never read as weights or results.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

_NAME = 40
"""Characters of a file's name that its temporary name keeps, so that it is never too long for the file system."""

_UNFINISHED = re.compile(r"\.(?P<name>.{0,40})\.[0-9a-f]{8}\.partial(\.\w+)?")


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Context manager that yields the path of a temporary file, with the suffix of `path`, to be written; at the end it
    is synced and takes the place of `path`. After an error `path` is as it was, and the temporary file is deleted.

    Args:
        path: the file, in a folder that exists.

    Raises:
        OSError: the file cannot be written.
    """
    partial = _partial(path)
    try:
        yield partial
        sync(partial)
        os.replace(partial, path)
        sync_folder(path.parent)
    finally:
        partial.unlink(missing_ok=True)


@contextmanager
def replacing_folder(path: Path) -> Iterator[Path]:
    """Context manager that yields a temporary folder to be filled; at the end it becomes the folder `path`, which must
    not exist or be empty. After an error it is deleted.

    Args:
        path: the folder, in a folder that exists.

    Raises:
        OSError: the folder is not empty, or cannot be made.
    """
    partial = _partial(path)
    partial.mkdir()
    try:
        yield partial
        sync_folder(partial)
        if path.is_dir():
            path.rmdir()  # raises if it is not empty
        os.replace(partial, path)
        sync_folder(path.parent)
    finally:
        import shutil  # with its archive formats it takes longer than the rest of this module

        shutil.rmtree(partial, ignore_errors=True)


def replace_files(files: Mapping[Path, Callable[[Path], None]]) -> None:
    """Call each path's function with the path of a temporary file to write, sync all of them, and then rename them to
    their paths, in order; after an error files that were new are deleted again.

    The order counts after a crash between two renames: an index comes last.

    Args:
        files: path -> function that writes its content; all in folders that exist.

    Raises:
        OSError: a file cannot be written.
    """
    partials = {path: _partial(path) for path in files}
    new = []
    try:
        for path, write in files.items():
            write(partials[path])
            sync(partials[path])
        *first, last = partials
        for path in first:
            new += [] if path.exists() else [path]
            os.replace(partials[path], path)
        for folder in {path.parent for path in first}:
            sync_folder(folder)  # what the last file names is there before it is
        os.replace(partials[last], last)
        sync_folder(last.parent)
    except BaseException:
        for path in new:
            path.unlink(missing_ok=True)
        raise
    finally:
        for partial in partials.values():
            partial.unlink(missing_ok=True)


def sync(path: Path) -> None:
    """Block until the content of a file is on disk.

    Raises:
        OSError: the file cannot be opened, or the disk is full or broken.
    """
    descriptor = os.open(path, os.O_RDWR)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sync_folder(folder: Path) -> None:
    """Block until the entries of a folder, such as a new name, are on disk; do nothing on Windows, which writes them
    through.

    Raises:
        OSError: the folder cannot be opened.
    """
    if os.name != "posix":
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError:
        pass  # some network file systems do not sync folders
    finally:
        os.close(descriptor)


def is_unfinished(path: Path) -> bool:
    """Whether a path has the name of a temporary file of this module."""
    return _UNFINISHED.fullmatch(path.name) is not None


def remove_unfinished(folder: Path, name: re.Pattern[str]) -> None:
    """Delete temporary files that an interrupted process left in a folder, of files whose name without its suffix
    matches `name` in full.

    Only the one process that writes these files may call it.

    Args:
        folder: the folder.
        name: matched against the first 40 characters of the name without its suffix.
    """
    for file in folder.iterdir():
        found = _UNFINISHED.fullmatch(file.name)
        if found is not None and name.fullmatch(found["name"]):
            file.unlink(missing_ok=True)


def check_writable(path: Path) -> None:
    """Raise ValueError unless a file can be written at a path, before the work that makes its content; folders above it
    that do not exist are not made.

    Args:
        path: the file to be written or replaced.

    Raises:
        ValueError: the path is a folder, a device or a read-only file, its name is too long, or its folder cannot be
            written to.
    """
    try:
        if path.is_dir():
            raise ValueError(f"{path} cannot be written: it is a folder. Name a file in it")
        if path.exists() and not path.is_file():
            raise ValueError(f"{path} cannot be written: it is no regular file. Name another path")
        if path.exists() and not path.stat().st_mode & 0o222:  # renaming another file to it would replace it
            raise ValueError(f"{path} cannot be written: it is read-only. Name another path, or make it writable")
        folder = path.parent
        while not folder.exists() and folder != folder.parent:
            folder = folder.parent
        if not folder.is_dir():
            raise ValueError(f"{path} cannot be written: {folder} is not a folder")
        path.exists()  # raises if the name is too long
        probe = _partial(folder / "x")
        with probe.open("xb"):
            pass
        probe.unlink()
    except OSError as error:
        raise ValueError(f"{path} cannot be written: {error.strerror or error}. Name another path") from None


def check_new_folder(path: Path) -> None:
    """Raise ValueError unless a folder can be made at a path, before the work that fills it: nothing is there, or an
    empty folder.

    Args:
        path: the folder.

    Raises:
        ValueError: a file is there, or a folder that is not empty, or the folder above cannot be written to.
    """
    if path.is_dir():
        if any(path.iterdir()):
            raise ValueError(f"{path} cannot be written: the folder is not empty. Name a new one, or empty it")
        path = path / "x"
    elif path.exists():
        raise ValueError(f"{path} cannot be written as a folder: a file is there. Name another path")
    check_writable(path)


def _partial(path: Path) -> Path:
    return path.with_name(f".{path.stem[:_NAME]}.{os.urandom(4).hex()}.partial{path.suffix}")
