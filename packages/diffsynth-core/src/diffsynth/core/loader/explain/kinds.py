"""What a file is that is no checkpoint, told by its first bytes; and opening those that may be one. No torch."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import BinaryIO

from diffsynth.errors import CorruptFile, NoFiles

_LOOK = 512

_SIGNS: tuple[tuple[bytes, str], ...] = (
    (b"GGUF", "is a GGUF file, quantised for other programs. Use the safetensors file of its repository, or convert "
              "it with the gguf package: docs/loading.md shows how"),
    (b"PK\x03\x04", "is a zip archive. If it is a torch pickle, name it .pth or .bin"),
    (b"\x80\x02", "is a torch pickle, not safetensors. Name it .pth or .bin"),
    (b"\x89HDF", "is an HDF5 file. diffsynth reads safetensors: convert it"),
    (b"\x89PNG", "is a picture, not weights"),
    (b"\x1f\x8b", "is compressed with gzip. Unpack it"),
    (b"\x28\xb5\x2f\xfd", "is compressed with zstd. Unpack it"),
    (b"7z\xbc\xaf", "is a 7z archive. Unpack it"),
    (b"{", "is JSON, not weights; is it the config beside them?"),
)  # fmt: skip


def open_weights(file: Path, *, pickled: bool = False) -> BinaryIO:
    """A file opened at its start, if it can be weights.

    Args:
        pickled: torch's pickles are expected, so that their signs are no fault.

    Raises:
        NoFiles: there is no such file, or it cannot be opened.
        CorruptFile: it is something else, and what.
    """
    if not file.is_file():
        raise NoFiles(f"{file} {why_not_there(file)}.")
    try:
        stream = file.open("rb")
    except OSError as error:
        raise NoFiles(f"{file} cannot be opened: {error.strerror}") from None
    start = stream.read(_LOOK)
    stream.seek(0)
    if what := _other_kind(start, pickled):
        stream.close()
        raise CorruptFile(f"{file} {what}")
    return stream


def why_not_there(file: Path) -> str:
    """The rest of a sentence about a path where no file can be read."""
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
    if not start:
        return "is empty. Fetch it again."
    if start.startswith(b"version https://git-lfs"):
        size = re.search(rb"\nsize (\d+)", start)
        of = f" of {int(size[1]):,} bytes" if size else ""
        return f"is a Git-LFS pointer, not the weights{of}. Run: git lfs pull"
    # The length that a safetensors file begins with fits four bytes: those after them tell text and archives apart.
    if start[4:8] == bytes(4):
        return ""
    if start.lstrip(b"\xef\xbb\xbf \r\n\t")[:1] == b"<":
        return "is a web page, not a checkpoint: the download was answered with an error page. Fetch it again."
    own = (b"PK\x03\x04", b"\x80\x02") if pickled else ()
    found = next((what for sign, what in _SIGNS if start.startswith(sign) and sign not in own), "")
    return f"{found}." if found and found[-1] != "?" else found
