"""The error message for a file that no architecture claims: what the file is, or which layout is nearest. No torch."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from diffsynth.core.loader import lora_bases, scaled
from diffsynth.core.loader.convert import Shape, normalized_key
from diffsynth.core.loader.key_differences import key_differences
from diffsynth.core.loader.layouts import layout_of
from diffsynth.spec import CheckpointSpec

_OPTIMIZER_MARKS = (".exp_avg", ".exp_avg_sq", ".momentum_buffer", ".state1", ".state2", ".step")

_NEAR = 0.1
"""Share of common keys (numbers aside) below which a layout is not called near."""


@dataclass(frozen=True)
class UnrecognizedFile:
    """A file that no installed architecture claims, and what recognition tried.

    Args:
        where: the file's name, for the message.
        shapes: key -> shape of its tensors.
        checkpoints: the installed layouts.
        refusals: (layout, wrapper prefix) -> why the structure tier refused the file as that layout.
        views: pairs of a wrapper prefix and the shapes under it, the prefix removed.
    """

    where: str
    shapes: Mapping[str, Shape]
    checkpoints: Sequence[CheckpointSpec]
    refusals: Mapping[tuple[str, str], str]
    views: Sequence[tuple[str, Mapping[str, Shape]]]


def explain(file: UnrecognizedFile) -> str:
    """Return a text of one or two sentences on why a file was not recognised: the first explanation that applies."""
    return next(text for reason in REASONS if (text := reason(file)))


def _no_tensors(file: UnrecognizedFile) -> str:
    return "" if file.shapes else f"{file.where} holds no tensors."


def _optimizer_state(file: UnrecognizedFile) -> str:
    marked = sum(key.endswith(_OPTIMIZER_MARKS) or key.startswith(("optimizer", "exp_avg")) for key in file.shapes)
    if marked <= len(file.shapes) / 2:
        return ""
    return f"{file.where} is an optimizer state, not a model checkpoint. The weights are in another file of that run."


def _lora(file: UnrecognizedFile) -> str:
    return lora_bases.explain(file.where, file.shapes, file.checkpoints)


def _packed(file: UnrecognizedFile) -> str:
    if not (name := scaled.packed_format(file.shapes)):
        return ""
    return f"{file.where} is quantised with {name}, which packs its weights; use a file in bf16 or scaled fp8."


def _family_not_installed(file: UnrecognizedFile) -> str:
    # Imported here because it reads the metadata of every installed distribution, which only an error needs.
    from diffsynth.core.loader import first_party

    home = next((text for _, shapes in file.views if (text := first_party.whose_keys(shapes))), "")
    return f"{file.where}: {home}" if home else ""


def _nearest(file: UnrecognizedFile) -> str:
    """Return a text that names the layout whose keys, numbers aside, overlap most with the file's, and the differences;
    if none is near, one that names two keys of the file.
    """
    best: tuple[tuple[bool, float], CheckpointSpec, str, Mapping[str, Shape]] | None = None
    found = {prefix: {normalized_key(key) for key in shapes} for prefix, shapes in file.views}
    for checkpoint in [each for each in file.checkpoints if not each.loras_only]:
        published = {normalized_key(key) for key in layout_of(checkpoint)}
        for prefix, shapes in file.views:
            near = len(found[prefix] & published) / max(len(found[prefix] | published), 1)
            score = found[prefix] <= published, near  # a file that lacks a part of one layout is none of another
            if near > _NEAR and (best is None or score > best[0]):
                best = (score, checkpoint, prefix, shapes)
    if best is None:
        keys = list(file.shapes)
        shown = " and ".join(repr(key) for key in (keys[0], keys[-1]) if key)
        return (
            f"{file.where}: no installed architecture has keys like {shown}. It has {len(keys)} tensors. "
            f"Is its family installed? Run: diffsynth plugins"
        )
    _, checkpoint, prefix, shapes = best
    layout = layout_of(checkpoint)
    shared = sum(key in shapes for key in layout)
    reason = file.refusals.get((checkpoint.name, prefix), "")
    differences = key_differences(shapes, layout)
    return (
        f"{file.where}: nearest is {checkpoint.name}, which shares {shared} of its {len(layout)} keys"
        + (f" under {prefix!r}" if prefix else "")
        + (f"; it is refused because {reason}" if reason else "")
        + (f". Differences: {differences.describe(limit=2)}" if differences else "")
        + "."
    )


REASONS: tuple[Callable[[UnrecognizedFile], str], ...] = (
    _no_tensors,
    _optimizer_state,
    _lora,
    _packed,
    _family_not_installed,
    _nearest,
)
"""Explanations in the order in which they are tried. Each returns a text, empty if it does not apply; the last one
always applies."""
