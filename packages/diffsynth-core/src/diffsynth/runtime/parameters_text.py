"""The text `parameters` of A1111, in which many programs and sites read how an image was made.

It has the prompt, a line "Negative prompt: ...", and a last line of "Name: value" pairs, separated by commas; a value
with a comma, a colon or a line end is a JSON string. Imports no torch.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import PurePath
from typing import Any

SAMPLERS = {
    "euler": "Euler",
    "heun": "Heun",
    "dpmpp_2m": "DPM++ 2M",
    "unipc": "UniPC",
    "euler_ancestral": "Euler a",
}
"""Name of a solver -> the sampler's name in A1111; others keep their names."""

_HASH = 10
"""Hexadecimal digits of the sha256 of a file that sites look models up by."""


def parameters_text(record: Mapping[str, Any], size: tuple[int, int]) -> str:
    """Return the text `parameters` of an image, in the form of A1111.

    Args:
        record: of the call, see `diffsynth.provenance.record`.
        size: width and height of the image, in pixels.

    Returns:
        the text. Hashes are those of files whose sha256 is known, which a downloaded file's is.
    """
    arguments = record.get("arguments") or {}
    values = {
        "Steps": record.get("num_inference_steps"),
        "Sampler": _sampler(record.get("solver")),
        "CFG scale": record.get("cfg_scale"),
        "Seed": record.get("seed"),
        "Size": f"{size[0]}x{size[1]}",
        "Model hash": _model_hash(record.get("weights") or {}),
        "Model": record.get("model"),
        "Denoising strength": arguments.get("denoising_strength"),
        "Lora hashes": _lora_hashes(record.get("loras") or ()),
        "Version": _version(record.get("versions") or {}),
    }
    last = ", ".join(f"{name}: {_quoted(value)}" for name, value in values.items() if value not in (None, ""))
    negative = arguments.get("negative_prompt")
    lines = [_text(record.get("prompt")), f"Negative prompt: {negative}" if negative else "", last]
    return "\n".join(line for line in lines if line)


def _text(value: Any) -> str:
    return value if isinstance(value, str) else "" if value is None else json.dumps(value, ensure_ascii=False)


def _quoted(value: Any) -> str:
    text = _text(value)
    return json.dumps(text, ensure_ascii=False) if set(text) & set(",:\n") else text


def _sampler(solver: Any) -> Any:
    return SAMPLERS.get(solver, solver) if isinstance(solver, str) else None


def _model_hash(weights: Mapping[str, Any]) -> str:
    """Return the hash of the network's file; "" if it has several, or one whose sha256 is not known."""
    files = weights.get("dit") or {}
    return _short(next(iter(files.values()))) if len(files) == 1 else ""


def _lora_hashes(loras: Any) -> str:
    found = {
        PurePath(name).stem: short
        for lora in loras
        for name, identity in (lora.get("files") or {}).items()
        if (short := _short(identity))
    }
    return ", ".join(f"{name}: {short}" for name, short in found.items())


def _short(identity: Any) -> str:
    kind, _, digits = str(identity).partition(":")
    return digits[:_HASH] if kind == "sha256" else ""


def _version(versions: Mapping[str, Any]) -> str:
    core = versions.get("diffsynth-core")
    return f"diffsynth-core {core}" if core else ""
