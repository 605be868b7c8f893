"""What tells one weight file from another: the hub's sha256 if it is known, else a sampled one."""

from __future__ import annotations

import hashlib
import json
import os
import re
from pathlib import Path

from diffsynth import _env

BLOCK = 2**20
BLOCKS = 64


def file_identity(path: Path) -> str:
    """`"sha256:..."` as the hub states it, or `"sampled-sha256:..."` of the size, the header and 64 blocks of 1 MiB.

    Sampled identities are cached by path, size and modification time.
    """
    known = _hub_sha256(path)
    if known:
        return f"sha256:{known}"
    stat = path.stat()
    key, stamp = str(path.resolve()), [stat.st_size, stat.st_mtime_ns]
    cache = _read_cache()
    entry = cache.get(key)
    if isinstance(entry, dict) and entry.get("stamp") == stamp:
        return str(entry["identity"])
    identity = f"sampled-sha256:{_sampled(path, stat.st_size)}"
    cache[key] = {"stamp": stamp, "identity": identity}
    _write_cache(cache)
    return identity


def _sampled(path: Path, size: int) -> str:
    digest = hashlib.sha256(str(size).encode())
    with path.open("rb") as stream:
        digest.update(stream.read(BLOCK))
        for block in range(BLOCKS):
            stream.seek(block * max(size - BLOCK, 0) // max(BLOCKS - 1, 1))
            digest.update(stream.read(BLOCK))
    return digest.hexdigest()


def _hub_sha256(path: Path) -> str:
    """The checksum that huggingface_hub leaves beside a download: commit, etag, time, one a line."""
    for folder in path.resolve().parents:
        note = folder / ".cache" / "huggingface" / "download" / f"{path.resolve().relative_to(folder)}.metadata"
        if note.is_file():
            lines = note.read_text(encoding="utf-8").splitlines()
            if len(lines) > 1 and re.fullmatch(r"[0-9a-f]{64}", lines[1].strip()):
                return lines[1].strip()
            return ""
        if (folder / ".cache").is_dir():
            return ""
    return ""


def _cache_file() -> Path:
    return _env.cache_dir() / "identity.json"


def _read_cache() -> dict[str, object]:
    try:
        cache = json.loads(_cache_file().read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return cache if isinstance(cache, dict) else {}


def _write_cache(cache: dict[str, object]) -> None:
    file = _cache_file()
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        partial = file.with_name(f".{file.name}.{os.getpid()}")
        partial.write_text(json.dumps(cache), encoding="utf-8")
        os.replace(partial, file)
    except OSError:
        # A read-only home costs a re-read next time, nothing else.
        return
