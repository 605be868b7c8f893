"""Small JSON files in the user's cache folder: measurements and identities that are costly to compute again."""

from __future__ import annotations

import json
import os
from typing import Any

from diffsynth import _env


def read_json_cache(name: str) -> dict[str, Any]:
    """Return the entries of a cache file as a dict; empty if the file is missing, unreadable or not a JSON object.

    Args:
        name: the file's name in the cache folder, such as `"speed.json"`.
    """
    try:
        entries = json.loads((_env.cache_dir() / name).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return entries if isinstance(entries, dict) else {}


def update_json_cache(name: str, key: str, value: Any) -> None:
    """Set one entry of a cache file and replace the file atomically; does nothing if the folder is read-only.

    Two processes that write at the same time may lose one entry, which is then computed again.

    Args:
        name: the file's name in the cache folder.
        key: the entry's key.
        value: any JSON value.
    """
    file = _env.cache_dir() / name
    text = json.dumps(read_json_cache(name) | {key: value}, indent=1)
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        partial = file.with_name(f".{file.name}.{os.getpid()}")
        partial.write_text(text, encoding="utf-8")
        os.replace(partial, file)
    except OSError:
        return
