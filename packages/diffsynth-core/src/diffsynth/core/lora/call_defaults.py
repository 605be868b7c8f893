"""The defaults of calls that a LoRA file asks for, in the metadata of safetensors. No torch."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from diffsynth.errors import KeyMismatch

KEY = "diffsynth.call_defaults"
"""The metadata entry: a JSON object, argument of a call -> default while the LoRA is loaded."""


def read_call_defaults(metadata: Mapping[str, str], where: str) -> dict[str, Any]:
    """Return a dict argument -> default of a call from a file's metadata; empty if the metadata says nothing.

    Args:
        metadata: text entries of the file.
        where: the file's name, for the message.

    Raises:
        KeyMismatch: the entry is no JSON object.
    """
    text = metadata.get(KEY)
    if text is None:
        return {}
    try:
        found = json.loads(text)
    except ValueError:
        found = None
    if not isinstance(found, dict):
        raise KeyMismatch(f"{where}: its metadata {KEY} is {text!r:.80}; expected a JSON object of call arguments")
    return found


def call_defaults_metadata(defaults: Mapping[str, Any]) -> dict[str, str]:
    """Return a dict with the metadata entry of call defaults; empty for none.

    Args:
        defaults: argument -> default, values of JSON.

    Raises:
        ValueError: a value that JSON does not have.
    """
    if not defaults:
        return {}
    try:
        return {KEY: json.dumps(dict(defaults))}
    except (TypeError, ValueError) as error:
        raise ValueError(f"call_defaults={dict(defaults)!r:.80}: expected numbers, texts and lists: {error}") from error
