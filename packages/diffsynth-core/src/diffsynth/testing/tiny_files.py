"""Contents of the tiny hub's weight files: small shapes under published key names, random values, and file names.

The keys are those of the layout file and go forward through the rules, as they do when a file is loaded. A rule is
never inverted: a wrong rule must not be able to write a file that fits it.
"""

from __future__ import annotations

import fnmatch
import itertools
import json
import zlib
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path, PurePosixPath

import torch
from safetensors.torch import save
from torch import Tensor

from diffsynth.core.loader import convert
from diffsynth.core.loader.convert import Rule, Shape
from diffsynth.core.loader.header import PICKLE_SUFFIXES
from diffsynth.core.loader.layouts.published import layout_of, rules_of
from diffsynth.errors import KeyMismatch
from diffsynth.spec import CheckpointSpec

SHARDS = 2

_MOST_PROPOSALS = 100_000

_LARGEST_UNREAD = 16
"""Extent of what rules drop, where nothing that stays has the like: the text tower beside a vision tower."""


@dataclass(frozen=True)
class TinyTensor:
    """What a small file says of one tensor."""

    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def nbytes(self) -> int:
        """Bytes of its data."""
        return prod(self.shape) * self.dtype.itemsize


TinyFile = Mapping[str, TinyTensor]
"""Published key -> its tensor; one logical file, however many shards it becomes."""


def write_weights(folder: Path, pattern: str, contents: TinyFile, *, file_stem: str) -> list[Path]:
    """Draw the tensors of a file and write them where `pattern` will find them.

    A glob becomes numbered shards with their index, a plain name one file. None carries metadata of ours.

    Args:
        folder: of the repository.
        pattern: inside it; its last part may hold `*`.
        contents: what to write.
        file_stem: how files begin where the pattern leaves it open.

    Returns:
        the files of tensors.

    Raises:
        ValueError: the pattern names no file, or none that is called like this.
    """
    names, index = file_names(pattern, file_stem, shards=min(SHARDS, len(contents)))
    tensors = draw(contents, seed=f"{folder.parent.name}/{folder.name}:{pattern}")
    keys = list(contents)
    where = {key: names[number * len(names) // len(keys)] for number, key in enumerate(keys)}
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        _save({key: tensors[key] for key in keys if where[key] == name}, folder / name)
    if index:
        shards = {key: PurePosixPath(name).name for key, name in where.items()}
        total = sum(tensor.nbytes for tensor in contents.values())
        text = json.dumps({"metadata": {"total_size": total}, "weight_map": shards}, indent=2)
        (folder / index).write_text(text + "\n", encoding="utf-8")
    return [folder / name for name in names]


def file_names(pattern: str, file_stem: str, *, shards: int) -> tuple[list[str], str]:
    """Names that a pattern matches, and that of their index; the index is empty for a single file.

    Raises:
        ValueError: the pattern leaves a folder open, names a folder, or matches no such name.
    """
    place, _, last = pattern.rpartition("/")
    begin, star, _ = last.partition("*")
    suffix = PurePosixPath(last).suffix
    if "*" in place or not suffix or any(mark in pattern for mark in "?["):
        raise ValueError(f"pattern {pattern!r}: expected a file, or a glob over files of one folder such as 'a/*.b'")
    if not star:
        return [pattern], ""
    stem = f"{place}/" * bool(place) + (begin.rstrip("-_.") or file_stem)
    names = [f"{stem}-{number:05d}-of-{shards:05d}{suffix}" for number in range(1, shards + 1)]
    if shards == 1:
        names = [f"{stem}{suffix}"]
    if unmatched := [name for name in names if not fnmatch.fnmatchcase(name, pattern)]:
        raise ValueError(f"pattern {pattern!r} does not match {unmatched[0]!r}; set file_stem of its CheckpointSpec")
    return names, f"{stem}{suffix}.index.json" if shards > 1 else ""


def draw(contents: TinyFile, *, seed: str) -> dict[str, Tensor]:
    """Tensors, the same for one seed: matrices at 1/sqrt(fan_in), norms 1 +- 0.1, biases at 0.1, integers 1."""
    generator = torch.Generator().manual_seed(zlib.crc32(seed.encode()))
    return {key: _drawn(key, tensor, generator) for key, tensor in contents.items()}


def _drawn(key: str, tensor: TinyTensor, generator: torch.Generator) -> Tensor:
    shape = tensor.shape
    if not tensor.dtype.is_floating_point:
        return torch.ones(shape, dtype=tensor.dtype)
    if key.endswith("bias"):
        values = 0.1 * torch.randn(shape, generator=generator)
    elif len(shape) < 2:
        values = 0.9 + 0.2 * torch.rand(shape, generator=generator)
    else:
        fan_in = prod(shape[1:]) if shape[0] > 1 else 1  # a single row is a learned token
        values = torch.randn(shape, generator=generator) / max(fan_in, 1) ** 0.5
    return values.to(tensor.dtype)


def _save(tensors: dict[str, Tensor], path: Path) -> None:
    if path.suffix.lower() in PICKLE_SUFFIXES:
        torch.save(tensors, path)
    else:
        path.write_bytes(save(tensors, metadata={"format": "pt"}))


def tiny_shapes(checkpoint: CheckpointSpec, wanted: Mapping[str, Shape]) -> dict[str, Shape]:
    """Published key -> small shape, in the layout's order, so that the file fills a small module.

    A key stays if something it feeds is wanted, or if the rules drop it on purpose.

    Args:
        checkpoint: a layout. One without rules may do without a layout file: its keys are the module's own.
        wanted: own key -> shape of the small module.

    Raises:
        ValueError: the published keys are not known, or no small shape of a key goes through its rule.
        KeyMismatch: what comes out of the rules is not what the module wants.
    """
    rules, published = rules_of(checkpoint), layout_of(checkpoint)
    if not published:
        if rules:
            raise ValueError(
                f"checkpoint {checkpoint.name!r} has rules and no layout, so its published key names are not known. "
                f"Give its CheckpointSpec a layout."
            )
        return dict(wanted)
    plan = convert.plan(rules, published)
    steps: dict[tuple[str, ...], list[str]] = {}
    for key, target in plan.targets.items():
        steps.setdefault(target.sources, []).append(key)
    small: dict[str, Shape] = {}
    for sources, keys in steps.items():
        if sources and any(key in wanted for key in keys):
            ends = [(plan.targets[key].shape, wanted.get(key)) for key in keys]
            whole = [published[source] for source in sources]
            try:
                shrunk = _shrink(plan.targets[keys[0]].rule, whole, ends)
            except ValueError as error:
                raise ValueError(f"checkpoint {checkpoint.name!r}, key {sources[0]!r}: {error}") from None
            small.update(zip(sources, shrunk, strict=True))
    learned = _learn((published[key], small[key]) for key in small)
    small |= {
        key: tuple(learned.get(extent, min(extent, _LARGEST_UNREAD)) for extent in published[key])
        for key in plan.dropped
    }
    ordered = {key: small[key] for key in published if key in small}
    convert.check(convert.plan(rules, ordered), wanted, where=f"the tiny file of checkpoint {checkpoint.name!r}")
    return ordered


def _shrink(rule: Rule, whole: Sequence[Shape], ends: Sequence[tuple[Shape, Shape | None]]) -> tuple[Shape, ...]:
    """Small sources from which the rule makes the small targets; a target of None may come out as it likes.

    Raises:
        ValueError: none do.
    """
    ratios = [pair for large, small in ends if small is not None for pair in zip(large, small, strict=False)]
    extents = [extent for shape in whole for extent in shape]
    proposals = itertools.product(*(_proposed(extent, ratios) for extent in extents))
    for proposal in itertools.islice(proposals, _MOST_PROPOSALS):
        rest = iter(proposal)
        sources = tuple(tuple(itertools.islice(rest, len(shape))) for shape in whole)
        if _makes(rule, sources, [small for _, small in ends]):
            return sources
    small = ", ".join(str(target) for _, target in ends)
    raise ValueError(
        f"no small shape in place of {whole[0]} comes out of {type(rule).__name__} as {small}. "
        f"Change ModelSpec.tiny, or write the rule so that it follows the shapes it is given."
    )


def _proposed(extent: int, ratios: Sequence[tuple[int, int]]) -> list[int]:
    """Extents to try in place of one: as the targets of this extent shrink, in proportion to others, or unchanged."""
    same = [small for large, small in ratios if large == extent]
    scaled = [extent * small // large for large, small in ratios if large and extent * small % large == 0]
    return list(dict.fromkeys([*same, *scaled, extent]))


def _makes(rule: Rule, sources: tuple[Shape, ...], targets: Sequence[Shape | None]) -> bool:
    try:
        made = rule.shapes(*sources)
    except (ValueError, IndexError, KeyMismatch):
        return False
    return all(small in (None, shape) for shape, small in zip(made, targets, strict=True))


def _learn(pairs: Iterable[tuple[Shape, Shape]]) -> dict[int, int]:
    """Published extent -> the small one that most often stands in its place."""
    seen: dict[int, Counter[int]] = {}
    for large, small in pairs:
        for before, after in zip(large, small, strict=True):
            seen.setdefault(before, Counter())[after] += 1
    return {before: counted.most_common(1)[0][0] for before, counted in seen.items()}
