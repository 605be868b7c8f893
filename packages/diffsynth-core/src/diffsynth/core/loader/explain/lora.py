"""Whether a file is a LoRA, and of what: by the modules it changes. No torch.

Knows the names of PEFT (`X.lora_A.weight`), of kohya (`lora_unet_X_Y.lora_down.weight`, with underscores for dots),
of LyCORIS (`lycoris_X_Y.lokr_w1`) and of plain differences (`X.diff`).
"""

from __future__ import annotations

import re
from collections.abc import Container, Mapping, Sequence
from dataclasses import dataclass

from diffsynth.core.loader import convert
from diffsynth.core.loader.layouts import inverse
from diffsynth.core.loader.layouts.published import layout_of, rules_of
from diffsynth.errors import KeyMismatch
from diffsynth.spec import CheckpointSpec, parse_source

Shape = tuple[int, ...]

_PART = re.compile(
    r"(?P<module>.+?)(?:\.lora_(?:A|B|down|up|mid)|(?:\.|_)lora\.(?:down|up)|\.lora_magnitude_vector"
    r"|\.hada_[wt][12](?:_[ab])?|\.lokr_[wt][12](?:_[ab])?|\.oft_blocks|\.(?P<side>alpha|dora_scale|diff|diff_b))"
    r"(?:\.\w+){0,2}"
)
_PREFIXES = (
    "base_model.model.", "model.diffusion_model.", "diffusion_model.", "transformer.", "unet.", "pipe.dit.", "model.",
    "text_encoder.", "module.",
)  # fmt: skip
_UNDERSCORED = re.compile(r"(?:lora_(?:unet|transformer|te\d?|text_encoder)|lycoris)_")

_ENOUGH = 0.5
"""Share of the modules that a base must have, and of their shapes that must fit."""


@dataclass(frozen=True)
class _Base:
    checkpoint: CheckpointSpec
    named: float
    fitting: float


def explain(where: str, shapes: Mapping[str, Shape], checkpoints: Sequence[CheckpointSpec]) -> str:
    """A sentence if the file is a LoRA; empty if it is not."""
    modules = target_modules(shapes)
    if not modules:
        return ""
    bases, best = _bases(modules, checkpoints)
    count = f"it changes {len(modules)} modules"
    if best is None or best.named < _ENOUGH:
        return (
            f"{where} is a LoRA, not a model checkpoint, and for none of the installed architectures: "
            f"{count}, like {next(iter(modules))!r}."
        )
    name = best.checkpoint.architecture
    if best.fitting < _ENOUGH:
        return f"{where} is a LoRA for another size of {name}, not a model checkpoint: {count}."
    of = _named(bases, best)
    return f"{where} is a LoRA for {of}, not a model checkpoint: {count}. Load that model, then add the LoRA to it."


def base_of(modules: Mapping[str, int], checkpoints: Sequence[CheckpointSpec]) -> str:
    """What a LoRA that changes these modules is for, its models and its architecture; empty if that is not known.

    Args:
        modules: as `target_modules` gives them.
        checkpoints: to choose from.
    """
    bases, best = _bases(modules, checkpoints)
    if best is None or best.named < _ENOUGH:
        return ""
    if best.fitting < _ENOUGH:
        return f"another size of {best.checkpoint.architecture}"
    return _named(bases, best)


def without_prefix(module: str, names: Container[str], underscored: Mapping[str, str]) -> str | None:
    """The name that a LoRA's name for a module stands for; None if there is no such module.

    Args:
        module: with a program's prefix before it, or with underscores for dots.
        names: of modules.
        underscored: each name with underscores for dots -> the name.
    """
    if match := _UNDERSCORED.match(module):
        return underscored.get(module[match.end() :])
    while module not in names:
        prefix = next((each for each in _PREFIXES if module.startswith(each)), "")
        if not prefix:
            return None
        module = module.removeprefix(prefix)
    return module


def target_modules(shapes: Mapping[str, Shape]) -> dict[str, int]:
    """Modules that a LoRA changes -> their inputs, 0 where the file does not tell; none if it is no LoRA."""
    modules: dict[str, int] = {}
    parts, sure = 0, False
    for key, shape in shapes.items():
        if (match := _PART.fullmatch(key)) is None:
            continue
        parts += 1
        sure = sure or match["side"] in (None, "diff", "diff_b")
        module = match["module"]
        inputs = shape[1] if len(shape) > 1 and re.search(r"lora(_A|_down|\.down)", key) else 0
        modules[module] = modules.get(module, 0) or inputs
    return modules if sure and parts > len(shapes) / 2 else {}


def _bases(modules: Mapping[str, int], checkpoints: Sequence[CheckpointSpec]) -> tuple[list[_Base], _Base | None]:
    """Each layout as a base, and the best of them."""
    bases = [_compare(modules, checkpoint, _weights(checkpoint, checkpoints)) for checkpoint in checkpoints]
    return bases, max(bases, key=lambda base: (base.named >= _ENOUGH, base.fitting, base.named), default=None)


def _named(bases: Sequence[_Base], best: _Base) -> str:
    name = best.checkpoint.architecture
    models = _models([each.checkpoint for each in bases if _is_like(each, name)])
    return f"{' or '.join(models)} ({name})" if models else name


def _is_like(base: _Base, architecture: str) -> bool:
    return base.checkpoint.architecture == architecture and base.fitting >= _ENOUGH


def _compare(modules: Mapping[str, int], checkpoint: CheckpointSpec, weights: Mapping[str, Shape]) -> _Base:
    underscored = {name.replace(".", "_"): name for name in weights}
    found = [
        (inputs, weights[name])
        for module, inputs in modules.items()
        if (name := without_prefix(module, weights, underscored)) is not None
    ]
    told = [(inputs, shape) for inputs, shape in found if inputs and len(shape) > 1]
    fitting = sum(inputs == shape[1] for inputs, shape in told) / len(told) if told else float(bool(found))
    return _Base(checkpoint, len(found) / len(modules), fitting)


def _weights(checkpoint: CheckpointSpec, checkpoints: Sequence[CheckpointSpec]) -> dict[str, Shape]:
    """Module -> shape of its weight, in a published layout; where no file proves it, as its rules say."""
    layout = layout_of(checkpoint)
    if not layout:
        layout = _by_rules(checkpoint, checkpoints)
    return {
        key.removesuffix(".weight"): shape
        for key, shape in layout.items()
        if key.endswith(".weight") and len(shape) > 1
    }


def _by_rules(checkpoint: CheckpointSpec, checkpoints: Sequence[CheckpointSpec]) -> Mapping[str, Shape]:
    for sibling in checkpoints:
        if sibling.architecture == checkpoint.architecture and sibling.layout:
            own = convert.plan(rules_of(sibling), layout_of(sibling)).shapes
            try:
                return inverse.file_shapes(rules_of(checkpoint), own)
            except (ValueError, KeyMismatch):
                continue
    return {}


def _models(checkpoints: Sequence[CheckpointSpec]) -> list[str]:
    """Repositories that these layouts come from, by their last segment."""
    ids = [parse_source(source).model_id for checkpoint in checkpoints for source in checkpoint.files]
    return list(dict.fromkeys(model_id.rpartition("/")[2] for model_id in ids if model_id))
