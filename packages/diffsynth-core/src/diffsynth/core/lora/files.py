"""LoRA files: read whichever way they are spelled, written as peft, diffusers and ComfyUI read them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from torch import Tensor

from diffsynth.core.loader import convert, pickled
from diffsynth.core.loader.reader.source import ComponentSource, stored_dtype
from diffsynth.core.loader.save import save_source
from diffsynth.core.loader.state_dict import load_state_dict
from diffsynth.core.lora.arithmetic import to_state_dict
from diffsynth.core.lora.layer import LoRA
from diffsynth.core.lora.spelling import parse

PREFIX = "diffusion_model."
"""Before a network's own names, for ComfyUI and for diffusers, which both look for it."""


def read_lora(source: str | Path | Sequence[Path] | Mapping[str, Tensor]) -> LoRA:
    """A LoRA by the module names of its file; `fit` makes them those of a module.

    Args:
        source: a file, the files of one LoRA, or a state dict.

    Raises:
        CheckpointError: no such file, or one that cannot be read.
        KeyMismatch: not a plain LoRA; see `parse`.
    """
    if isinstance(source, Mapping):
        return parse(source)
    paths = [Path(source)] if isinstance(source, str | Path) else list(source)
    return parse(load_state_dict(paths), ", ".join(map(str, paths)))


def save_lora(
    lora: LoRA | Mapping[str, Tensor],
    path: Path | str,
    *,
    prefix: str = PREFIX,
    metadata: Mapping[str, str] | None = None,
) -> Path:
    """Write a LoRA as safetensors, whole or not at all: `lora_A`, `lora_B`, and `alpha` where it is not the rank.

    What is read back is equal to the bit.

    Args:
        lora: by a network's own names; or a state dict, in any spelling.
        path: the file; one that is there is replaced.
        prefix: before each name that does not begin with it. peft wants `"base_model.model."`, a text encoder
            `"text_encoder."`.
        metadata: more of it; values are text.

    Returns:
        The file.

    Raises:
        ValueError: metadata that is no text, or a dtype that the format does not have.
        KeyMismatch: a state dict that is no plain LoRA.
    """
    made = lora if isinstance(lora, LoRA) else parse(lora)
    made = LoRA({name.removeprefix(prefix): layer for name, layer in made.layers.items()})
    tensors = pickled.of_state_dict(to_state_dict(made, prefix))
    targets = convert.plan((), tensors.shapes).targets
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    if wrong := [key for key, value in (metadata or {}).items() if not isinstance(value, str)]:
        raise ValueError(f"metadata[{wrong[0]!r}] is {(metadata or {})[wrong[0]]!r}; expected text")
    dtypes = {key: stored_dtype(tensors, key) for key in targets}
    save_source(ComponentSource(tensors, targets, dtypes), path, metadata=metadata)
    return path
