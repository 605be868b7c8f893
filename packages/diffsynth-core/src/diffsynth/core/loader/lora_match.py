"""The parameters of a network that the changes of a LoRA file belong to, by names, rules and shapes. No torch.

The rules that convert a layout's weights to ours convert the changes of the weights, too. Loading a LoRA and explaining
a file both use this, so they never disagree about what fits.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Container, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from math import prod

from diffsynth.core.loader import convert
from diffsynth.core.loader.convert import Shape
from diffsynth.core.loader.layouts import file_shapes, layout_of, rules_of
from diffsynth.core.loader.lora_keys import LOW_RANK, REPLACEMENT, Change
from diffsynth.errors import KeyMismatch
from diffsynth.spec import CheckpointSpec

_PREFIXES = (
    "base_model.model.", "model.diffusion_model.", "diffusion_model.", "transformer.", "transformer_2.", "unet.",
    "pipe.", "dit.", "dit2.", "model.", "text_encoder.", "text_encoder_2.", "text_encoder_3.", "module.",
    "state_dict.", "net.",
)  # fmt: skip
_TEXT_ENCODERS = re.compile(r"text_encoders\.[^.]+\.(?:transformer\.)?")
_UNDERSCORED = re.compile(r"(?:lora_(?:unet|transformer|dit|te\d?|text_encoder(?:_\d)?)|lycoris)[_.]+")
_WRAPPERS = re.compile(r"(?:^|(?<=\.))(?:_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)\.")

IDENTITIES = (convert.Rename, convert.Tie, convert.Dequantize, convert.Check)
"""Rules that keep a tensor as it is, and so the change of it."""

_HINTS = (
    (re.compile(r"pipe\.(?P<role>\w+)\."), ""),
    (re.compile(r"(?:lora_te|lora_text_encoder_?|text_encoder_?|te)(?P<number>\d?)[._]|text_encoders\."), "text"),
    (re.compile(r"(?:lora_transformer|transformer|dit)_?(?P<number>2)[._]"), "network"),
    (re.compile(r"(?:lora_unet|lora_transformer|lora_dit|transformer|unet|dit|(?:model\.)?diffusion_model)[._]"),
     "network"),
)  # fmt: skip

_PARAMETERS = {
    "weight": ("{}.weight", "{}", "{}.scale", "{}.gamma"),
    "bias": ("{}.bias",),
    "modulation": ("{}.modulation", "{}.scale_shift_table"),
}
"""Part of a module that a file names -> patterns of the parameter's name, the first that exists."""


def role_hint(module: str) -> tuple[str, str]:
    """Return a tuple (kind, number) of the component that a LoRA's module name names: the kind is `"text"`,
    `"network"`, `"role:dit"` or empty for any; the number is a text such as `"2"`, or empty.

    Args:
        module: the name in the file, with its prefix.
    """
    module = module.removeprefix("base_model.model.").removeprefix("module.")
    for pattern, kind in _HINTS:
        if match := pattern.match(module):
            found = match.groupdict()
            if "role" in found:
                return f"role:{found['role']}", ""
            return kind, found.get("number") or ""
    return "", ""


def without_prefixes(module: str) -> Iterator[str]:
    """Yield a LoRA's module name, and what remains of it after each known prefix: `"transformer.a"`, then `"a"`.

    Args:
        module: the name in the file.
    """
    yield module
    while prefix := _prefix(module):
        module = module.removeprefix(prefix)
        yield module


def _prefix(module: str) -> str:
    if not module.startswith(_PREFIXES):  # nearly all names: a file may have 20,000
        return ""
    return next(each for each in _PREFIXES if module.startswith(each))


def without_prefix(module: str, names: Container[str], underscored: Mapping[str, str]) -> str | None:
    """Return the model's module name for a LoRA's name, `"blocks.0"` for `"lora_unet_blocks_0"`; None if there is none.

    Args:
        module: the LoRA's name, with a program's prefix before it, or with underscores for dots.
        names: the module names that exist.
        underscored: each of them with underscores for dots -> the name.
    """
    if module in names:
        return module
    module = _WRAPPERS.sub("", module)
    if match := _UNDERSCORED.match(module):
        return _underscored_name(module[match.end() :].replace(".", "_"), underscored)
    while module not in names:
        for similar in _similar(module):
            if similar in names:
                return similar
        if match := _TEXT_ENCODERS.match(module):
            module = module[match.end() :]
            continue
        prefix = _prefix(module)
        if not prefix:
            return None
        module = module.removeprefix(prefix)
    return module


def _similar(module: str) -> Iterator[str]:
    """Yield other spellings of a LoRA's module name that a module may have in its place."""
    if module.endswith(".to_out"):
        yield f"{module}.0"
    if module.endswith("_lora"):  # of a processor in older versions of diffusers
        yield module.removesuffix("_lora").replace(".processor.", ".")
    yield f"model.{module}"


def _underscored_name(module: str, underscored: Mapping[str, str]) -> str | None:
    while module not in underscored:
        if (similar := f"model_{module}") in underscored:
            return underscored[similar]
        prefix = next((each for each in _PREFIXES if module.startswith(each.replace(".", "_"))), "")
        if not prefix:
            return None
        module = module[len(prefix) :]
    return underscored[module]


class Layout:
    """A layout whose names a LoRA may have.

    Args:
        name: the layout's name, for the log.
        rules: the rules from the file's names to ours.
        shapes: parameter name -> shape of the module.
        published: key -> shape of a file of that layout; empty if there is none.
    """

    def __init__(
        self, name: str, rules: Sequence[convert.Rule], shapes: Mapping[str, Shape], published: Mapping[str, Shape]
    ) -> None:
        self.name = name
        self.rules = [rule for rule in rules if not isinstance(rule, convert.Drop)]
        self._shapes = shapes
        self._published = published

    @functools.cached_property
    def keys(self) -> frozenset[str]:
        """Keys of parameters, in the layout and in our own naming together, a frozenset."""
        sources = (
            convert.fill(source, holes)
            for rule in self.rules
            for target in rule.targets
            for key in self._shapes
            if (holes := convert.match(target, key)) is not None
            for source in rule.sources
        )
        return frozenset((*self._shapes, *sources))

    @functools.cached_property
    def names(self) -> frozenset[str]:
        """Names of modules and of parameters, in the layout and in our own naming together, a frozenset."""
        return frozenset((*self.keys, *(key.rpartition(".")[0] for key in self.keys if "." in key)))

    @functools.cached_property
    def underscored(self) -> Mapping[str, str]:
        """Mapping from each name with underscores for dots to the name."""
        return {name.replace(".", "_"): name for name in self.names}

    @functools.cached_property
    def file_shapes(self) -> Mapping[str, Shape]:
        """Mapping key -> shape of the tensors in a file of this layout, for the module's size; empty if it cannot be
        derived.
        """
        try:
            return file_shapes(self.rules, self._shapes, self._published)
        except (ValueError, KeyMismatch):
            return {}

    def key_of(self, change: Change) -> str | None:
        """Return the key of the parameter that a change belongs to; None if the layout has none of that name."""
        name = without_prefix(change.module, self.names, self.underscored)
        if name is None:
            return None
        keys = (pattern.format(name) for pattern in _PARAMETERS[change.part])
        return next((key for key in keys if key in self.keys), None)


def layouts_of(shapes: Mapping[str, Shape], checkpoints: Sequence[CheckpointSpec]) -> Iterator[Layout]:
    """Yield the `Layout`s (naming schemes) of a module: one with its own names, then one for each different set of
    rules of `checkpoints`.

    Args:
        shapes: parameter name -> shape of the module.
        checkpoints: the published layouts of the module's architecture.
    """
    yield Layout("its own", (), shapes, {})
    by_rules = {checkpoint.rules: checkpoint for checkpoint in reversed(checkpoints) if checkpoint.rules}
    for checkpoint in reversed(by_rules.values()):
        yield Layout(checkpoint.name, rules_of(checkpoint), shapes, layout_of(checkpoint))


@dataclass(frozen=True)
class Matched:
    """The change of one of our parameters: output `index` of `rule`, applied to the changes of a file.

    Args:
        rule: the rule that converts the parameter.
        index: the number of the rule's output.
        sources: the changes that the rule is applied to; a shape stands for a parameter that the LoRA leaves alone.
        shape: shape of the result; a flattened convolution has that of its file.
    """

    rule: convert.Rule
    index: int
    sources: tuple[Change | Shape, ...]
    shape: Shape

    @property
    def changes(self) -> tuple[Change, ...]:
        """The changes among the sources, a tuple."""
        return tuple(each for each in self.sources if isinstance(each, Change))


@dataclass
class Match:
    """The result of looking for a LoRA's changes in a module.

    Args:
        targets: our parameter name -> its changes, which add up.
        left: name of a change in the file -> why it does not fit; empty text if the module has no such parameter.
        known: how many of the LoRA's changes have a name that the layout has.
        total: number of changes.
    """

    targets: dict[str, list[Matched]] = field(default_factory=dict)
    left: dict[str, str] = field(default_factory=dict)
    known: int = 0
    total: int = 0

    @property
    def fits(self) -> bool:
        """Whether every change fits, and there is one."""
        return bool(self.targets) and not self.left

    @property
    def twice(self) -> list[str]:
        """Our names of parameters that are changed under more than one name in the file, a list."""
        names = {
            key: {tuple(each.module for each in one.changes) for one in found} for key, found in self.targets.items()
        }
        return [key for key, found in names.items() if len(found) > 1]

    @property
    def unknown(self) -> list[str]:
        """Names of changes whose parameter the module does not have, a list."""
        return [name for name, reason in self.left.items() if not reason]

    @property
    def wrong(self) -> list[str]:
        """One text for each other reason why a change does not fit, a list."""
        return list(dict.fromkeys(reason for reason in self.left.values() if reason))


def match(
    changes: Sequence[Change], own: Mapping[str, Shape], layouts: Iterable[Layout], widened: Container[str] = ()
) -> Match:
    """Return the `Match` of a LoRA's changes with a module: in one layout's names, or, if none has all, in those of
    several.

    Args:
        changes: the changes of a file.
        own: parameter name -> shape of the module.
        layouts: the layouts that the module's weights are published in; see `layouts_of`.
        widened: names of our weights whose changes may have another number of inputs.
    """
    attempts: list[tuple[Layout, Match]] = []
    for layout in layouts:
        attempt = _attempt(changes, own, layout, widened)
        if attempt.fits:
            return attempt
        attempts.append((layout, attempt))
    best_layout, best = max(attempts, key=lambda each: (each[1].known, len(each[1].targets)))
    for layout, attempt in attempts:
        # A file may be put together from files of several layouts.
        if layout is best_layout or attempt.known == 0 or not best.unknown:
            continue
        missing = set(best.unknown)
        _merge(best, _attempt([change for change in changes if change.name in missing], own, layout, widened))
    return best


def _merge(best: Match, other: Match) -> None:
    for key, matched in other.targets.items():
        best.targets.setdefault(key, []).extend(matched)
        for change in (change for one in matched for change in one.changes):
            best.left.pop(change.name, None)
    best.known += other.known
    best.left |= {name: reason for name, reason in other.left.items() if reason and name in best.left}


def _attempt(changes: Sequence[Change], own: Mapping[str, Shape], layout: Layout, widened: Container[str]) -> Match:
    result = Match(total=len(changes))
    named: dict[str, list[Change]] = {}
    for change in changes:
        key = layout.key_of(change)
        if key is None:
            result.left[change.name] = ""
        else:
            named.setdefault(key, []).append(change)
    result.known = len(named)
    shapes = {key: found[0].shape for key, found in named.items()}
    absent = _absent_parts(layout, named)
    planned, failed = _planned(layout, shapes | absent)
    for key, reason in failed.items():
        result.left |= {change.name: reason for change in named.get(key, ())}
    for key, target in planned:
        held = [named.get(source, []) for source in target.sources]
        for level in range(max(map(len, held), default=0)):
            sources = tuple(
                found[level] if level < len(found) else absent.get(source) or found[0].shape
                for source, found in zip(target.sources, held, strict=True)
            )
            _add(result, key, Matched(target.rule, target.index, sources, target.shape), own, widened)
    _drop_parts(result)
    return result


def _add(result: Match, key: str, matched: Matched, own: Mapping[str, Shape], widened: Container[str]) -> None:
    reason = None
    if key not in own:
        reason = ""
    elif not _fits_shape(matched, own[key]) and not (key in widened and _fits_outputs(matched, own[key])):
        reason = f"{key} is {own[key]}, the {matched.changes[0].kind} is for {matched.shape}"
    elif refusal := _refusal(matched):
        reason = f"{key}: {refusal}"
    if reason is None:
        result.targets.setdefault(key, []).append(matched)
    else:
        result.left |= {change.name: reason for change in matched.changes}


def _fits_shape(matched: Matched, own: Shape) -> bool:
    if matched.shape == own:
        return True
    return (
        isinstance(matched.rule, IDENTITIES)
        and len(own) > 2
        and prod(matched.shape) == prod(own)
        and matched.shape[:1] == own[:1]
    )


def _fits_outputs(matched: Matched, own: Shape) -> bool:
    """Whether a LoRA changes a linear layer's weight of as many outputs, with more or fewer inputs than `own`."""
    plain = all(change.kind == LOW_RANK and not change.is_dora for change in matched.changes)
    return plain and isinstance(matched.rule, IDENTITIES) and len(matched.shape) == 2 and matched.shape[0] == own[0]


def _refusal(matched: Matched) -> str:
    """Return why a rule does not convert a change; empty if it does."""
    rule = matched.rule
    if isinstance(rule, IDENTITIES):
        return ""
    if any(change.kind == REPLACEMENT for change in matched.changes):
        return f"it is converted by {type(rule).__name__}, which needs the values of a whole weight"
    linear = convert.Split | convert.Fuse | convert.ReorderChunks | convert.Reshape | convert.Permute
    if not isinstance(rule, linear):
        return f"the file's layout has it under {type(rule).__name__}, which cannot be applied to a LoRA"
    whole = isinstance(rule, convert.Fuse | convert.ReorderChunks) and rule.dim == 0
    by_rows = whole or (isinstance(rule, convert.Split) and rule.dim == 0)
    # A column of a weight that is split has a length that no part of it knows.
    if any(change.is_dora and not (whole if change.by_inputs else by_rows) for change in matched.changes):
        return f"it is converted by {type(rule).__name__}, under which the magnitudes of a DoRA have no meaning"
    return ""


def _drop_parts(result: Match) -> None:
    """Remove the changes of parameters that are made of a change that does not fit elsewhere: no change is applied to a
    part of its parameters.
    """
    again = bool(result.left)
    while again:
        again = False
        for key, found in list(result.targets.items()):
            kept = []
            for each in found:
                bad = next((change.name for change in each.changes if change.name in result.left), None)
                if bad is None:
                    kept.append(each)
                    continue
                for change in each.changes:
                    again = again or change.name not in result.left
                    result.left.setdefault(change.name, result.left[bad] or f"it is joined with {bad}, which is absent")
            result.targets[key] = kept
            if not kept:
                del result.targets[key]


def _planned(layout: Layout, shapes: Mapping[str, Shape]) -> tuple[list[tuple[str, convert.Target]], dict[str, str]]:
    """Return a tuple: pairs of our key and its planned target, and a dict source key -> why it has none."""
    try:
        planned = list(convert.plan(layout.rules, shapes).targets.items())
        failed: dict[str, str] = {}
    except KeyMismatch:
        planned, failed = [], {}
        for group in _groups(layout, shapes):
            try:
                planned += convert.plan(layout.rules, {key: shapes[key] for key in group}).targets.items()
            except KeyMismatch as error:
                failed |= dict.fromkeys(group, str(error))
    return [(key, target) for key, target in planned if target.sources], failed


def _groups(layout: Layout, shapes: Mapping[str, Shape]) -> list[list[str]]:
    """Return a list of lists of keys that are converted together: the parts of a fused weight, or one key."""
    grouped: dict[str, list[str]] = {}
    for rule in layout.rules:
        if isinstance(rule, convert.Fuse):
            for parts in _parts(rule, shapes):
                grouped |= dict.fromkeys((part for part in parts if part in shapes), parts)
    groups = {tuple(part for part in grouped.get(key, [key]) if part in shapes): None for key in shapes}
    return [list(group) for group in groups]


def _absent_parts(layout: Layout, named: Mapping[str, object]) -> dict[str, Shape]:
    """Return a dict key -> shape of the weights that the LoRA leaves unchanged but that are fused with some that it
    changes, as far as their shapes are known.
    """
    absent: dict[str, Shape] = {}
    for rule in layout.rules:
        if isinstance(rule, convert.Fuse):
            for parts in _parts(rule, named):
                lacking = [part for part in parts if part not in named]
                absent |= {part: layout.file_shapes[part] for part in lacking if part in layout.file_shapes}
    return absent


def _parts(rule: convert.Fuse, keys: Iterable[str]) -> Iterator[list[str]]:
    """Yield the lists of keys that a rule joins, of which at least one is among `keys`."""
    for key in keys:
        for pattern in rule.parts:
            if (holes := convert.match(pattern, key)) is not None:
                yield [convert.fill(part, holes) for part in rule.parts]
                break
