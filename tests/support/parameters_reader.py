"""A reader of the text `parameters`, written from the published description of A1111's format."""

from __future__ import annotations

import json


def read_parameters(text: str) -> dict[str, str]:
    """Return a dict of the fields: "Prompt", "Negative prompt", and the pairs of the last line, if it has three."""
    lines = text.strip().split("\n")
    pairs = _pairs(lines[-1])
    if len(pairs) >= 3:
        lines = lines[:-1]
    else:
        pairs = {}
    prompt: list[str] = []
    negative: list[str] | None = None
    for line in lines:
        if line.strip().startswith("Negative prompt:"):
            negative = [line.strip().removeprefix("Negative prompt:").strip()]
        else:
            (prompt if negative is None else negative).append(line.strip())
    return {"Prompt": "\n".join(prompt), "Negative prompt": "\n".join(negative or []), **pairs}


def _pairs(line: str) -> dict[str, str]:
    """Return name -> value of "Name: value, Name: "quoted, value", ..."."""
    found, rest = {}, line
    while ":" in rest:
        name, rest = (part.strip() for part in rest.split(":", 1))
        if rest.startswith('"'):
            value, length = json.JSONDecoder().raw_decode(rest)
            rest = rest[length:].lstrip().removeprefix(",")
        else:
            value, _, rest = rest.partition(",")
        found[name] = value.strip()
    return found
