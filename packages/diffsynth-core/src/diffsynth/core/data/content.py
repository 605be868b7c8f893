"""Checks of a media file before it is decoded: that it exists, and what its first bytes say that it is."""

from __future__ import annotations

import os
from pathlib import Path

from diffsynth.errors import NoFiles

_HEAD = 512

_SIGNATURES = (
    (b"\x89PNG\r\n\x1a\n", 0, "a PNG image"),
    (b"GIF8", 0, "a GIF image"),
    (b"\xff\xd8\xff", 0, "a JPEG image"),
    (b"BM", 0, "a BMP image"),
    (b"II*\0", 0, "a TIFF image"),
    (b"MM\0*", 0, "a TIFF image"),
    (b"WEBP", 8, "a WebP image"),
    (b"ftypavif", 4, "an AVIF image"),
    (b"ftypavis", 4, "an AVIF image"),
    (b"ftypheic", 4, "a HEIC image; convert it to JPEG or PNG"),
    (b"ftypheix", 4, "a HEIC image; convert it to JPEG or PNG"),
    (b"ftypmif1", 4, "a HEIF image; convert it to JPEG or PNG"),
    (b"ftyp", 4, "an MP4 or MOV file"),
    (b"\x1aE\xdf\xa3", 0, "a Matroska or WebM file"),
    (b"AVI ", 8, "an AVI file"),
    (b"WAVE", 8, "a WAV file"),
    (b"fLaC", 0, "a FLAC file"),
    (b"ID3", 0, "an MP3 file"),
    (b"OggS", 0, "an Ogg file"),
    (b"%PDF", 0, "a PDF document"),
    (b"8BPS", 0, "a Photoshop document"),
    (b"PK\x03\x04", 0, "a ZIP archive"),
    (b"\x1f\x8b", 0, "a gzip archive"),
    (b"version https://git-lfs", 0, "a pointer of Git LFS, not the file itself; run: git lfs pull"),
)
"""(bytes, their position, what a file with them is)."""

IMAGE_KINDS = (
    "a PNG image",
    "a GIF image",
    "a WebP image",
    "an AVIF image",
    "a JPEG image",
    "a BMP image",
    "a TIFF image",
)
"""The results of `describe` that are images which PIL decodes."""

VIDEO_KINDS = ("an MP4 or MOV file", "a Matroska or WebM file", "an AVI file")
"""The results of `describe` that are containers of video."""

AUDIO_KINDS = ("a WAV file", "a FLAC file", "an MP3 file", "an Ogg file")
"""The results of `describe` that are sound."""


def existing_file(path: object, kind: str) -> Path:
    """Return `path` as a `Path`, after a check that it is an existing file, not empty.

    Args:
        path: text or path object.
        kind: what the file should hold, for messages: "image", "video", "audio".

    Raises:
        TypeError: neither a text nor a path object.
        NoFiles: no such file, a folder, a link to nothing, or something that is no file, such as a device.
    """
    if not isinstance(path, str | os.PathLike):
        raise TypeError(f"the path of {_article(kind)} {kind} is {type(path).__name__}; expected a text or a Path")
    path = Path(path)
    try:
        if path.is_file():
            return path
        if path.is_dir():
            reason = "is a folder"
        elif path.is_symlink() and not path.exists():
            reason = f"is a link to {os.readlink(path)}, which does not exist"
        else:
            reason = "is not a file, but a device or a pipe" if path.exists() else "does not exist"
    except OSError as error:
        reason = f"cannot be looked up: {error.strerror}"
    raise NoFiles(f"{kind} {path} {reason}")


def describe(content: bytes) -> str:
    """Return what a file is by its first bytes, as text: "a PNG image", "a web page", "empty", "unknown data".

    Args:
        content: the first bytes of the file, or all of them.
    """
    if not content:
        return "empty"
    head = content[:_HEAD]
    for signature, position, name in _SIGNATURES:
        if head.startswith(signature, position):
            return name
    text = head.decode("utf-8", errors="ignore").lstrip("\ufeff \t\r\n")
    start = text[:200].lower()
    if start.startswith(("<!doctype html", "<html", "<head")) or "<html" in start:
        return "a web page, not a file that was downloaded from it"
    if start.startswith("<svg") or (start.startswith("<?xml") and "<svg" in text.lower()):
        return "an SVG drawing; convert it to PNG"
    if start.startswith(("http://", "https://", "[internetshortcut]", "[desktop entry]")):
        return "a link, not the file that it leads to"
    printable = sum(letter.isprintable() or letter in "\r\n\t" for letter in text)
    if text and printable == len(text) and len(text.encode()) >= len(head.strip()) - 8:
        return f"a text that begins with {text[:30]!r}"
    return "unknown data"


def describe_file(path: Path) -> str:
    """Return what a file is by its first bytes; see `describe`.

    Raises:
        OSError: the file cannot be read.
    """
    with path.open("rb") as file:
        return describe(file.read(_HEAD))


def _article(word: str) -> str:
    return "an" if word[:1] in "aeiou" else "a"
