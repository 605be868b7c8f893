"""Opening weight files, and naming what a file is that holds no weights, by its first bytes. No torch."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import BinaryIO

from diffsynth.errors import CorruptFile, NoFiles

_START = 512
"""Bytes that are read to tell what a file is."""

_SIGNS: tuple[tuple[bytes, str], ...] = (
    (b"GGUF", "is a GGUF file, quantised for other programs. Use the safetensors file of its repository, or convert "
              "it with the gguf package: docs/loading.md shows how"),
    (b"PK\x03\x04", "is a zip archive. If it is a torch pickle, name it .pth or .bin"),
    (b"\x80\x02", "is a torch pickle, not safetensors. Name it .pth or .bin"),
    (b"\x89HDF", "is an HDF5 file. diffsynth reads safetensors: convert it"),
    (b"\x89PNG", "is an image, not weights"),
    (b"\x1f\x8b", "is compressed with gzip. Unpack it"),
    (b"\x28\xb5\x2f\xfd", "is compressed with zstd. Unpack it"),
    (b"7z\xbc\xaf", "is a 7z archive. Unpack it"),
    (b"{", "is JSON, not weights; is it the config beside them?"),
)  # fmt: skip
"""First bytes of a file -> the rest of a sentence about it."""


def open_weights(file: Path, *, pickled: bool = False) -> BinaryIO:
    """Open a file and return the binary stream, at its start; raise NoFiles if it cannot be opened, CorruptFile if its
    first bytes show another kind of file.

    Args:
        pickled: whether torch pickles are accepted.

    Raises:
        NoFiles: there is no such file, or it cannot be opened.
        CorruptFile: the file is of another kind; the message names it.
    """
    try:
        if not file.is_file():
            raise NoFiles(f"{file} {why_missing(file)}.")
        stream = file.open("rb")
    except OSError as error:
        raise NoFiles(f"{file!s:.300} cannot be opened: {error.strerror or error}") from None
    try:
        start = stream.read(_START)
        stream.seek(0)
    except OSError as error:
        stream.close()
        raise CorruptFile(f"{file} cannot be read: {error.strerror or error}") from None
    if kind := _other_kind(start, pickled):
        stream.close()
        raise CorruptFile(f"{file} {kind}")
    return stream


def exists(file: Path) -> bool:
    """Whether there is a file or folder at a path.

    Raises:
        NoFiles: no name like that can exist, because it is too long, or its folder cannot be looked into.
    """
    try:
        return file.exists()
    except OSError as error:
        raise NoFiles(f"{file!s:.300} cannot be opened: {error.strerror or error}") from None


def why_missing(file: Path) -> str:
    """Return a phrase, to follow the path, on why no file can be read there: "does not exist", "is a folder; ..."."""
    if file.is_dir():
        return "is a folder; name the files in it"
    if file.is_symlink():
        try:
            os.stat(file)
        except OSError as error:
            leads = "back to itself" if "symbolic links" in str(error) else "to nothing"
            return f"is a link to {os.readlink(file)}, which leads {leads}"
    return "is no regular file" if file.exists() else "does not exist"


def _other_kind(start: bytes, pickled: bool) -> str:
    """Return a phrase on what a file with these first bytes is, `"is an image, not weights."`; empty if it may hold
    weights.
    """
    if not start:
        return "is empty. Fetch it again."
    if start.startswith(b"version https://git-lfs"):
        size = re.search(rb"\nsize (\d+)", start)
        of = f" of {int(size[1]):,} bytes" if size else ""
        return f"is a Git-LFS pointer, not the weights{of}. Run: git lfs pull"
    # The header length of a safetensors file is below 2**32: the upper four of its eight bytes are zero, which no text
    # and no archive begins with.
    if start[4:8] == bytes(4):
        return ""
    if start.lstrip(b"\xef\xbb\xbf \r\n\t")[:1] == b"<":
        return "is a web page, not a checkpoint: the download was answered with an error page. Fetch it again."
    accepted = (b"PK\x03\x04", b"\x80\x02") if pickled else ()
    found = next((kind for sign, kind in _SIGNS if start.startswith(sign) and sign not in accepted), "")
    return f"{found}." if found and found[-1] != "?" else found
