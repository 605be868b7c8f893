"""Whether a file is a LoRA, and for which architecture, by what it changes. No torch.

`lora_keys` reads the keys and `lora_match` finds the parameters, as they do for loading, so that what is said here is
what `load_lora` does.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from math import prod

from diffsynth.core.loader import convert
from diffsynth.core.loader.convert import Shape
from diffsynth.core.loader.layouts import layout_of, rules_of, shapes_under
from diffsynth.core.loader.lora_keys import Change, LoRAKeys, lora_keys, lora_share
from diffsynth.core.loader.lora_match import layouts_of, match, role_hint, without_prefix
from diffsynth.errors import shortened
from diffsynth.spec import CheckpointSpec, parse_source

_ENOUGH = 0.5
"""Share of the LoRA's modules that a base model must have, and share of their sizes that must agree."""

_SAMPLE = 256
"""Number of modules by which bases are compared; the chosen one is compared by all."""


@dataclass(frozen=True)
class _Base:
    """A layout as a LoRA's base: the share of module names it has, and the share of sizes that agree."""

    checkpoint: CheckpointSpec
    named: float
    fitting: float


@dataclass(frozen=True)
class _Answer:
    """The model that a part of a LoRA is for, as text, and what of it does not fit, name -> reason.

    The text is empty if no architecture has the part; `compared` is False if the model's shapes are not known. `twice`
    are parameters that the part changes under two names.
    """

    text: str
    compared: bool = False
    left: Mapping[str, str] = field(default_factory=dict)
    twice: Sequence[str] = ()


def explain(where: str, shapes: Mapping[str, Shape], checkpoints: Sequence[CheckpointSpec]) -> str:
    """Return a sentence that says that a file is a LoRA, for which model it was made, and whether `load_lora` adds it;
    empty if the file is not a LoRA.

    Args:
        where: the file's name, for the message.
        shapes: key -> shape of its tensors.
        checkpoints: the layouts to choose a base from.
    """
    found = lora_keys(shapes)
    if not lora_share(shapes, found):
        return ""
    if found.too_many:
        return f"{where} is a LoRA, not a model checkpoint, and {found.too_many}."
    groups: dict[bool, list[Change]] = {}
    for change in found.changes:
        groups.setdefault(role_hint(change.module)[0] == "text", []).append(change)
    answers = [answer for changes in groups.values() for answer in _answers(changes, checkpoints)]
    count = f"it changes {found.modules} modules"
    bases = " and ".join(dict.fromkeys(answer.text for answer in answers if answer.text))
    if not bases:
        first = found.changes[0].module if found.changes else next(iter(found.broken))
        text = f"{where} is a LoRA, not a model checkpoint, and for none of the installed architectures: {count}, "
        return f"{text}like {first!r}.{_refused(found, {})}"
    left = {name: why for each in answers for name, why in each.left.items()}
    text = f"{where} is a LoRA for {bases}, not a model checkpoint: {count}."
    if twice := [key for answer in answers for key in answer.twice]:
        text += (
            f" It changes {shortened(twice, 2)} under two names: equal changes are added once, others only if one is a "
            "part of a fused weight."
        )
    if not all(answer.compared for answer in answers):
        return text + _refused(found, left)
    return text + (_refused(found, left) or _next_step(found))


def base_of(changes: Sequence[Change], checkpoints: Sequence[CheckpointSpec]) -> str:
    """Return a text with the models and the architecture that a LoRA is for, "Z-Image (z_image_dit)" or "another size
    of z_image_dit"; empty if unknown.

    Args:
        changes: the LoRA's changes, with the names of its file.
        checkpoints: the layouts to choose from.
    """
    return _text(*_bases(changes, checkpoints))


def _text(bases: Sequence[_Base], best: _Base | None) -> str:
    if best is None or best.named < _ENOUGH:
        return ""
    if best.fitting < _ENOUGH:
        return f"another size of {best.checkpoint.architecture}"
    return _named(bases, best)


def _answers(changes: Sequence[Change], checkpoints: Sequence[CheckpointSpec]) -> list[_Answer]:
    """Return a list of `_Answer`s: for the model that most changes are for, then for the one that most of the rest are
    for, as a file may be for a network and several text encoders.
    """
    answers: list[_Answer] = []
    while changes:
        answer = _answer(changes, checkpoints)
        missing = [change for change in changes if answer.left.get(change.name) == ""]
        if not answer.text or len(missing) == len(changes) or not base_of(missing, checkpoints):
            return [*answers, answer]
        names = {change.name for change in missing}
        answers.append(replace(answer, left={name: why for name, why in answer.left.items() if name not in names}))
        changes = missing
    return answers


def _answer(changes: Sequence[Change], checkpoints: Sequence[CheckpointSpec]) -> _Answer:
    bases, best = _bases(changes, checkpoints)
    text = _text(bases, best)
    if best is None or not text or best.fitting < _ENOUGH:
        return _Answer(text)
    siblings = [each for each in checkpoints if each.architecture == best.checkpoint.architecture]
    own = convert.plan(rules_of(best.checkpoint), layout_of(best.checkpoint)).shapes
    found = match(changes, own, layouts_of(own, siblings))
    return _Answer(text, True, found.left, found.twice)


def _refused(found: LoRAKeys, left: Mapping[str, str]) -> str:
    """Return a sentence on what `load_lora` refuses of a file; empty if nothing."""
    texts = [found.complaint()] if found.broken or found.others else []
    if left:
        names = shortened([why or name for name, why in left.items()], 3)
        texts.append(f"{len(left)} of its {len(found.changes)} changes do not fit that model: {names}")
    if not texts:
        return ""
    partly = " strict=False adds the rest." if len(left) < len(found.changes) else ""
    return f" load_lora refuses it: {'; '.join(texts)}.{partly}"


def _next_step(found: LoRAKeys) -> str:
    if not found.kinds:
        return " Load that model, then add the LoRA to it."
    kinds = " and ".join(found.kinds)
    return f" Load that model, then fuse the {kinds} into it: load_lora with hotload=False."


def _bases(changes: Sequence[Change], checkpoints: Sequence[CheckpointSpec]) -> tuple[list[_Base], _Base | None]:
    """Return a tuple: a list with a `_Base` (how well it fits) for each layout, and the best of them, None without
    layouts or changes.
    """
    sample = changes[:: max(len(changes) // _SAMPLE, 1)]
    if not sample:
        return [], None
    bases = [_compare(sample, published, names) for published, names in _names(checkpoints)]
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


def _compare(changes: Sequence[Change], checkpoint: CheckpointSpec, weights: Mapping[str, Shape]) -> _Base:
    underscored = {name.replace(".", "_"): name for name in weights}
    found = [
        (change, weights[name])
        for change in changes
        if (name := without_prefix(change.module, weights, underscored)) is not None
    ]
    sized = [(change.shape, shape) for change, shape in found if change.part == "weight"]
    agree = sum(prod(shape) == prod(own) and shape[:1] == own[:1] for shape, own in sized)
    fitting = agree / len(sized) if sized else float(bool(found))
    return _Base(checkpoint, len(found) / len(changes), fitting)


def _names(checkpoints: Sequence[CheckpointSpec]) -> Iterator[tuple[CheckpointSpec, dict[str, Shape]]]:
    """Yield (layout, dict module name -> shape of its weight): the names of each layout with a list of keys, and the
    names of each without one for every size of its architecture, with the layout that has the size.
    """
    for checkpoint in checkpoints:
        if checkpoint.layout:
            yield checkpoint, _weights(layout_of(checkpoint))
            continue
        sizes = [each for each in checkpoints if each.architecture == checkpoint.architecture and each.layout]
        for sibling in sizes:
            if shapes := shapes_under(checkpoint, sibling):
                yield sibling, _weights(shapes)
        if not sizes:
            yield checkpoint, {}


def _weights(layout: Mapping[str, Shape]) -> dict[str, Shape]:
    return {key.removesuffix(".weight"): shape for key, shape in layout.items() if key.endswith(".weight")}
