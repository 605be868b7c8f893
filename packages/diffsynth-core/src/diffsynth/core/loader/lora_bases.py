"""Whether a file is a LoRA, and for which architecture, by the modules that it changes. No torch.

Known names are those of PEFT (`X.lora_A.weight`), of kohya (`lora_unet_X_Y.lora_down.weight`, with underscores for
dots), of LyCORIS (`lycoris_X_Y.lokr_w1`) and of plain differences (`X.diff`).
"""

from __future__ import annotations

import re
from collections.abc import Container, Mapping, Sequence
from dataclasses import dataclass

from diffsynth.core.loader import convert
from diffsynth.core.loader.convert import Shape
from diffsynth.core.loader.layouts import file_shapes, layout_of, rules_of
from diffsynth.errors import KeyMismatch
from diffsynth.spec import CheckpointSpec, parse_source

_LORA_KEY = re.compile(
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
"""Share of the LoRA's modules that a base model must have, and share of their input sizes that must agree."""


@dataclass(frozen=True)
class _Base:
    """A layout as a LoRA's base: the share of module names it has, and the share of input sizes that agree."""

    checkpoint: CheckpointSpec
    named: float
    fitting: float


def explain(where: str, shapes: Mapping[str, Shape], checkpoints: Sequence[CheckpointSpec]) -> str:
    """Return a sentence that says that a file is a LoRA and for which model it was made; empty if the file is not a
    LoRA.

    Args:
        where: the file's name, for the message.
        shapes: key -> shape of its tensors.
        checkpoints: the layouts to choose a base from.
    """
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
    """Return a text with the models and the architecture that a LoRA is for, "Z-Image (z_image_dit)" or "another size
    of z_image_dit"; empty if unknown.

    Args:
        modules: module name -> input size, as `target_modules` returns them.
        checkpoints: the layouts to choose from.
    """
    bases, best = _bases(modules, checkpoints)
    if best is None or best.named < _ENOUGH:
        return ""
    if best.fitting < _ENOUGH:
        return f"another size of {best.checkpoint.architecture}"
    return _named(bases, best)


def without_prefix(module: str, names: Container[str], underscored: Mapping[str, str]) -> str | None:
    """Return the model's module name for a LoRA's name, `"blocks.0"` for `"lora_unet_blocks_0"`; None if there is none.

    Args:
        module: the LoRA's name, with a program's prefix before it, or with underscores for dots.
        names: the module names that exist.
        underscored: each of them with underscores for dots -> the name.
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
    """Return a dict module name -> number of input features (0: unknown) for what a LoRA changes; empty if it is no
    LoRA.

    The size is 0 where the file's shapes do not tell it.

    Args:
        shapes: key -> shape of the file's tensors.
    """
    modules: dict[str, int] = {}
    lora_keys, certain = 0, False
    for key, shape in shapes.items():
        if (match := _LORA_KEY.fullmatch(key)) is None:
            continue
        lora_keys += 1
        # An alpha alone is no proof: other checkpoints have parameters of that name.
        certain = certain or match["side"] in (None, "diff", "diff_b")
        module = match["module"]
        inputs = shape[1] if len(shape) > 1 and re.search(r"lora(_A|_down|\.down)", key) else 0
        modules[module] = modules.get(module, 0) or inputs
    return modules if certain and lora_keys > len(shapes) / 2 else {}


def _bases(modules: Mapping[str, int], checkpoints: Sequence[CheckpointSpec]) -> tuple[list[_Base], _Base | None]:
    """Return a tuple: a list with a `_Base` (how well it fits) for each layout, and the best of them, None without
    layouts.
    """
    bases = [_compare(modules, checkpoint, _weights(checkpoint, checkpoints)) for checkpoint in checkpoints]
    return bases, max(bases, key=lambda base: (base.named >= _ENOUGH, base.fitting, base.named), default=None)


def _named(bases: Sequence[_Base], best: _Base) -> str:
    """Return a text such as `"Z-Image or Z-Image-Turbo (z_image_dit)"`: the models that fit the LoRA, and their
    architecture.

    It is the architecture alone if the layouts name no repository.
    """
    name = best.checkpoint.architecture
    fitting = [base.checkpoint for base in bases if base.checkpoint.architecture == name and base.fitting >= _ENOUGH]
    ids = [parse_source(source).model_id for checkpoint in fitting for source in checkpoint.files]
    models = list(dict.fromkeys(model_id.rpartition("/")[2] for model_id in ids if model_id))
    return f"{' or '.join(models)} ({name})" if models else name


def _compare(modules: Mapping[str, int], checkpoint: CheckpointSpec, weights: Mapping[str, Shape]) -> _Base:
    underscored = {name.replace(".", "_"): name for name in weights}
    found = [
        (inputs, weights[name])
        for module, inputs in modules.items()
        if (name := without_prefix(module, weights, underscored)) is not None
    ]
    sized = [(inputs, shape) for inputs, shape in found if inputs and len(shape) > 1]
    fitting = sum(inputs == shape[1] for inputs, shape in sized) / len(sized) if sized else float(bool(found))
    return _Base(checkpoint, len(found) / len(modules), fitting)


def _weights(checkpoint: CheckpointSpec, checkpoints: Sequence[CheckpointSpec]) -> dict[str, Shape]:
    """Return a dict module name -> shape of its weight in a layout, without modules whose weight has fewer than two
    axes.
    """
    layout = layout_of(checkpoint) or _by_rules(checkpoint, checkpoints)
    return {
        key.removesuffix(".weight"): shape
        for key, shape in layout.items()
        if key.endswith(".weight") and len(shape) > 1
    }


def _by_rules(checkpoint: CheckpointSpec, checkpoints: Sequence[CheckpointSpec]) -> Mapping[str, Shape]:
    """Return a dict key -> shape of a layout without a list of keys, derived from another of its architecture; else
    empty.

    Its rules are undone on a published layout of the same architecture.
    """
    for sibling in checkpoints:
        if sibling.architecture == checkpoint.architecture and sibling.layout:
            own = convert.plan(rules_of(sibling), layout_of(sibling)).shapes
            try:
                return file_shapes(rules_of(checkpoint), own)
            except (ValueError, KeyMismatch):
                continue
    return {}
