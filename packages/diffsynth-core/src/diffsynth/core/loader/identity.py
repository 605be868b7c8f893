"""The identity of a weight file: the hub's sha256 if it is known, otherwise a sha256 of samples."""

from __future__ import annotations

import hashlib
import re
import struct
from pathlib import Path

from diffsynth.core.json_cache import read_json_cache, update_json_cache
from diffsynth.errors import NoFiles

_CACHE = "identity.json"
BLOCK = 2**20
BLOCKS = 64


def file_identity(path: Path) -> str:
    """Return a weight file's identity, a text: `"sha256:..."` if the hub's is known, else `"sampled-sha256:..."` of
    samples.

    The samples are the size, the header and 64 blocks of 1 MiB. Files of at most 64 MiB are read whole. Sampled
    identities are cached by path, size and modification time.

    Raises:
        NoFiles: there is no such file.
    """
    if not path.is_file():
        raise NoFiles(f"{path} is not a file; an identity needs the weights themselves")
    known = hub_sha256(path)
    if known:
        return f"sha256:{known}"
    stat = path.stat()
    key, stamp = str(path.resolve()), [stat.st_size, stat.st_mtime_ns]
    entry = read_json_cache(_CACHE).get(key)
    if isinstance(entry, dict) and entry.get("stamp") == stamp:
        return str(entry["identity"])
    identity = f"sampled-sha256:{_sampled(path, stat.st_size)}"
    update_json_cache(_CACHE, key, {"stamp": stamp, "identity": identity})
    return identity


def hub_sha256(path: Path) -> str:
    """Return the sha256 (hexadecimal text) that huggingface_hub noted for a downloaded file; empty if no note is valid
    for it.

    The note has three lines: commit, etag, time. It is not valid for a file that was written after it.
    """
    for folder in path.resolve().parents:
        note = folder / ".cache" / "huggingface" / "download" / f"{path.resolve().relative_to(folder)}.metadata"
        if note.is_file():
            lines = note.read_text(encoding="utf-8").splitlines()
            if len(lines) < 3 or not re.fullmatch(r"[0-9a-f]{64}", lines[1].strip()):
                return ""
            return lines[1].strip() if path.stat().st_mtime <= _seconds(lines[2]) + 1 else ""
        if (folder / ".cache").is_dir():
            return ""
    return ""


def _sampled(path: Path, size: int) -> str:
    digest = hashlib.sha256(str(size).encode())
    with path.open("rb") as stream:
        if size <= BLOCK * BLOCKS:
            digest.update(stream.read())
            return digest.hexdigest()
        digest.update(stream.read(_header_length(path, size)))
        for block in range(BLOCKS):
            stream.seek(block * (size - BLOCK) // (BLOCKS - 1))
            digest.update(stream.read(BLOCK))
    return digest.hexdigest()


def _header_length(path: Path, size: int) -> int:
    """Return the length in bytes of a safetensors file's header with its length field; 1 MiB (2**20) for any other
    file.
    """
    with path.open("rb") as stream:
        (length,) = struct.unpack("<Q", stream.read(8))
        return 8 + length if length < size and stream.read(1) == b"{" else BLOCK


def _seconds(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        return 0.0
