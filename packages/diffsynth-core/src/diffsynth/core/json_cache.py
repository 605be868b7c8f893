"""Small JSON files in the user's cache folder: measurements and identities that are costly to compute again."""

from __future__ import annotations

import json
from typing import Any

from diffsynth import _env
from diffsynth.core.replacing import replacing


def read_json_cache(name: str) -> dict[str, Any]:
    """Return the content of a JSON file in the user's cache folder as a dict; empty if it is missing, unreadable or no
    object.

    Args:
        name: the file's name in the cache folder, such as `"speed.json"`.
    """
    try:
        entries = json.loads((_env.cache_dir() / name).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return entries if isinstance(entries, dict) else {}


def update_json_cache(name: str, key: str, value: Any) -> None:
    """Set entry `key` of a JSON file in the user's cache folder to `value`, atomically; do nothing if it cannot be
    written.

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
        with replacing(file) as partial:
            partial.write_text(text, encoding="utf-8")
    except OSError:
        return
