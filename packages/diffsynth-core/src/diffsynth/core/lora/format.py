"""The LoRA format: two thin matrices for each linear layer (Hu et al. 2021, arXiv:2106.09685), and its files.

Files are read in the key names of all usual programs, and written in those that peft, diffusers and ComfyUI read. A key
that is no part of a LoRA is an error that names it: leaving it out would change the result without a word.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

import torch
from jaxtyping import Float
from torch import Tensor

from diffsynth.core.loader import convert, pickled
from diffsynth.core.loader.reader.source import ComponentSource, stored_dtype
from diffsynth.core.loader.save import save_source
from diffsynth.core.loader.state_dict import load_state_dict
from diffsynth.errors import KeyMismatch, shortened

PREFIX = "diffusion_model."
"""The prefix of a network's names in LoRA files, which ComfyUI and diffusers both look for."""

_MATRIX = re.compile(
    r"(?P<module>.+)\.(?:lora_(?P<side>A|B|down|up)|lora\.(?P<dotted>down|up))(?:\.(?P<adapter>\w+))?\.weight"
)
"""Keys of peft and diffusers, with or without an adapter name; of kohya; and of diffusers before it used peft."""

_ALPHA = re.compile(r"(?P<module>.+)\.alpha")

_DOWN = ("A", "down")

_OTHER_ADAPTERS = {
    r".*\.(lora_magnitude_vector|dora_scale)(\..+)?": "DoRA (a LoRA with a magnitude for each output)",
    r".*\.(hada|lokr|oft)_.+": "LoHa, LoKr or OFT (not a product of two matrices)",
    r".*\.lora_mid\..+": "a convolution in three factors",
    r".*\.(diff|diff_b|set_weight)": "a plain difference of a whole parameter",
    r".*\.lora_(A|B|down|up)(\.\w+)?\.bias": "a LoRA with biases",
    r".*\.lora_embedding_(A|B)(\..+)?": "a LoRA of an embedding",
}
"""Pattern of keys of other adapters -> what they are."""

_NO_LORA_KEY = "no part of a LoRA"


@dataclass(frozen=True, eq=False)
class LoRALayer:
    """The change of one linear layer: its weight becomes `W + scale * up @ down`.

    Args:
        down: matrix A, from the layer's inputs to the rank.
        up: matrix B, from the rank to the layer's outputs.
        alpha: the change is multiplied by `alpha / rank`; None means by 1.
    """

    down: Float[Tensor, "rank inputs"]
    up: Float[Tensor, "outputs rank"]
    alpha: float | None = None

    @property
    def rank(self) -> int:
        """Rank of the change, an int: rows of `down` and columns of `up`."""
        return self.down.shape[0]

    @property
    def scale(self) -> float:
        """Factor of the change: `alpha / rank`, or 1.0 if `alpha` is None."""
        return 1.0 if self.alpha is None else self.alpha / self.rank

    @property
    def shape(self) -> tuple[int, int]:
        """Shape (outputs, inputs) of the weight that is changed, a tuple of ints."""
        return self.up.shape[0], self.down.shape[1]

    def scaled_up(self, alpha: float = 1.0) -> Float[Tensor, "outputs rank"]:
        """Return matrix B (`up`) multiplied by `alpha * scale`, a new fp32 tensor."""
        return self.up.float() * (alpha * self.scale)


@dataclass(frozen=True, eq=False)
class LoRA:
    """The changed layers of one LoRA.

    Args:
        layers: module name -> change.
        where: the file's name, for messages.
    """

    layers: Mapping[str, LoRALayer]
    where: str = "the given state_dict"


def read_lora(source: str | Path | Sequence[Path] | Mapping[str, Tensor]) -> LoRA:
    """Return the `LoRA` of a file, of several files or of a state dict, with the module names found there (`fit`
    translates them).

    Args:
        source: a file, the files of one LoRA, or a state dict.

    Raises:
        CheckpointError: there is no such file, or it cannot be read.
        KeyMismatch: the file is not a plain LoRA; see `parse`.
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
    """Write `lora` as a safetensors file to `path`, replacing an existing one, and return the file's `Path`.

    Its keys are `lora_A`, `lora_B` and, for layers that have one, `alpha`. The file is written atomically. Reading it
    gives the same bits.

    Args:
        lora: a LoRA with a network's own names, or a state dict in any known key names.
        path: the file; an existing one is replaced.
        prefix: put before each name that does not start with it. peft reads `"base_model.model."`, and text encoders
            have `"text_encoder."`.
        metadata: additional metadata; values must be text.

    Returns:
        The file.

    Raises:
        ValueError: metadata that is not text, or a dtype that the format does not have.
        KeyMismatch: a state dict that is not a plain LoRA.
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


def to_state_dict(lora: LoRA, prefix: str = "") -> dict[str, Tensor]:
    """Return the state dict (key -> tensor) of `lora` with `prefix` before each module name:
    `"blocks.0.to_q.lora_A.weight"`, `...lora_B.weight` and, if the layer has one, `...alpha`.

    Args:
        prefix: put before every module name.
    """
    tensors: dict[str, Tensor] = {}
    for name, layer in lora.layers.items():
        tensors[f"{prefix}{name}.lora_A.weight"] = layer.down
        tensors[f"{prefix}{name}.lora_B.weight"] = layer.up
        if layer.alpha is not None:
            tensors[f"{prefix}{name}.alpha"] = torch.tensor(layer.alpha)
    return tensors


def parse(state_dict: Mapping[str, Tensor], where: str = "the given state_dict") -> LoRA:
    """Return the `LoRA` that `state_dict` holds, in the key names of any usual program; raise KeyMismatch if any key is
    no part of a LoRA or a matrix is missing.

    Args:
        state_dict: key -> tensor; every key must be a part of a LoRA.
        where: the file's name, for messages.

    Raises:
        KeyMismatch: no key is a LoRA's, some are another adapter's, a matrix is missing, or the two matrices of a layer
            have different ranks.
    """
    matrices: dict[tuple[str, str], dict[str, Tensor]] = {}
    alphas: dict[str, float] = {}
    others: list[str] = []
    for key, tensor in state_dict.items():
        if match := _MATRIX.fullmatch(key):
            side = "down" if (match["side"] or match["dotted"]) in _DOWN else "up"
            pair = matrices.setdefault((match["module"], match["adapter"] or ""), {})
            if side in pair:
                raise KeyMismatch(f"{where} holds {key} and the same matrix under another spelling; expected one")
            pair[side] = tensor
        elif (match := _ALPHA.fullmatch(key)) and tensor.numel() == 1:
            alphas[match["module"]] = float(tensor)
        else:
            others.append(key)
    if others or not matrices:
        _refuse(where, others, count=len(state_dict), is_lora=bool(matrices))
    if len(adapters := sorted({adapter for _, adapter in matrices})) > 1:
        named = ", ".join(repr(adapter) for adapter in adapters)
        raise KeyMismatch(f"{where} holds several adapters: {named}; expected one. Give the keys of one as state_dict")
    layers = {module: _layer(where, module, pair, alphas.pop(module, None)) for (module, _), pair in matrices.items()}
    if alphas:
        raise KeyMismatch(f"{where} has an alpha but no matrices for {shortened(alphas, 4)}")
    return LoRA(layers, where)


def _layer(where: str, module: str, pair: Mapping[str, Tensor], alpha: float | None) -> LoRALayer:
    if len(pair) < 2:
        (side,) = pair
        raise KeyMismatch(f"{where} has the {side} matrix of {module} alone; expected down and up (lora_A and lora_B)")
    down, up = pair["down"], pair["up"]
    if down.dim() > 2 and up.dim() == down.dim() and all(size == 1 for size in (*down.shape[2:], *up.shape[2:])):
        down, up = down.flatten(1), up.flatten(1)  # a linear layer that was written as a 1x1 convolution
    if down.dim() != 2 or up.dim() != 2:
        raise KeyMismatch(
            f"{where}: {module} has matrices of shape {tuple(down.shape)} and {tuple(up.shape)}; expected 2 axes each, "
            "those of a linear layer"
        )
    if down.shape[0] != up.shape[1]:
        raise KeyMismatch(
            f"{where}: the down matrix of {module}, {tuple(down.shape)}, has rank {down.shape[0]}, and the up matrix, "
            f"{tuple(up.shape)}, has rank {up.shape[1]}; expected one rank. The file is damaged"
        )
    if down.shape[0] == 0:
        raise KeyMismatch(f"{where}: {module} has rank 0; expected 1 or more")
    return LoRALayer(down, up, alpha)


def _refuse(where: str, others: list[str], *, count: int, is_lora: bool) -> NoReturn:
    """Always raise KeyMismatch: it says that there is no LoRA at all, or lists the keys in `others` that are no part of
    one, by kind.
    """
    kinds: dict[str, list[str]] = {}
    for key in others:
        kind = next((text for pattern, text in _OTHER_ADAPTERS.items() if re.fullmatch(pattern, key)), _NO_LORA_KEY)
        kinds.setdefault(kind, []).append(key)
    if not is_lora and set(kinds) <= {_NO_LORA_KEY}:
        raise KeyMismatch(
            f"{where} holds no LoRA: none of its {count} keys is a lora_A, lora_B, lora_down or lora_up"
            f"{f', such as {others[0]}' if others else ''}. A checkpoint is loaded with model_configs"
        )
    groups = "; ".join(f"{shortened(keys, 4)}: {kind}" for kind, keys in kinds.items())
    raise KeyMismatch(
        f"{where} has {len(others)} keys that cannot be applied, so no layer was changed: {groups}. "
        "Use a plain LoRA, or give the other keys alone as state_dict"
    )
