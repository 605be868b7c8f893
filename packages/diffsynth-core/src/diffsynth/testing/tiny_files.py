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
from diffsynth.core.loader.files import PICKLE_SUFFIXES
from diffsynth.core.loader.layouts import layout_of, rules_of
from diffsynth.errors import KeyMismatch
from diffsynth.spec import CheckpointSpec

SHARDS = 2
"""Number of shards that a file is split into if its source is a glob."""

_MAX_PROPOSALS = 100_000

_MAX_DROPPED_EXTENT = 16
"""Largest extent of dropped tensors if no kept tensor has that extent, as in a text tower beside a vision tower."""


@dataclass(frozen=True)
class TinyTensor:
    """Shape and dtype of one tensor of a tiny file."""

    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def nbytes(self) -> int:
        """Size of the tensor's data in bytes, an int."""
        return prod(self.shape) * self.dtype.itemsize


TinyFile = Mapping[str, TinyTensor]
"""Published key -> shape and dtype; one logical file, which may be written as several shards."""


def write_weights(folder: Path, pattern: str, contents: TinyFile, *, file_stem: str) -> list[Path]:
    """Write random tensors to one file, or to several if `pattern` is a glob, and return a list of the paths of these
    files.

    A glob gives numbered shards with an index file, a plain name one file. No metadata of ours is written.

    Args:
        folder: path of the repository.
        pattern: file name in the repository; its last segment may contain `*`.
        contents: shapes and dtypes to write.
        file_stem: beginning of the file names if the pattern does not determine it.

    Returns:
        the paths of the weight files, without the index.

    Raises:
        ValueError: the pattern names no file, or does not match the names made from `file_stem`.
    """
    names, index = file_names(pattern, file_stem, shards=min(SHARDS, len(contents)))
    tensors = random_tensors(contents, seed=f"{folder.parent.name}/{folder.name}:{pattern}")
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
    """Return ([file names that `pattern` matches], name of their index file): `shards` numbered names for a glob; the
    index is `""` if there is only one file.

    Raises:
        ValueError: the pattern contains a glob in a folder name, names a folder, or does not match `file_stem`.
    """
    folder, _, last = pattern.rpartition("/")
    begin, star, _ = last.partition("*")
    suffix = PurePosixPath(last).suffix
    if "*" in folder or not suffix or any(mark in pattern for mark in "?["):
        raise ValueError(f"pattern {pattern!r}: expected a file, or a glob over files of one folder such as 'a/*.b'")
    if not star:
        return [pattern], ""
    stem = f"{folder}/" * bool(folder) + (begin.rstrip("-_.") or file_stem)
    names = [f"{stem}-{number:05d}-of-{shards:05d}{suffix}" for number in range(1, shards + 1)]
    if shards == 1:
        names = [f"{stem}{suffix}"]
    if unmatched := [name for name in names if not fnmatch.fnmatchcase(name, pattern)]:
        raise ValueError(f"pattern {pattern!r} does not match {unmatched[0]!r}; set file_stem of its CheckpointSpec")
    return names, f"{stem}{suffix}.index.json" if shards > 1 else ""


def random_tensors(contents: TinyFile, *, seed: str) -> dict[str, Tensor]:
    """Return a dict key -> CPU tensor of the given shape and dtype: random floats, the same for equal `seed`s, and
    integers of 1.

    Standard deviation 1/sqrt(fan_in) for matrices and 0.1 for biases; norms in [0.9, 1.1]; integers are 1. No value
    is neutral, so that a tensor that is ignored or misplaced changes results.
    """
    generator = torch.Generator().manual_seed(zlib.crc32(seed.encode()))
    return {key: _random_tensor(key, tensor, generator) for key, tensor in contents.items()}


def _random_tensor(key: str, tensor: TinyTensor, generator: torch.Generator) -> Tensor:
    shape = tensor.shape
    if not tensor.dtype.is_floating_point:
        return torch.ones(shape, dtype=tensor.dtype)
    if key.endswith("bias"):
        values = 0.1 * torch.randn(shape, generator=generator)
    elif len(shape) < 2:
        values = 0.9 + 0.2 * torch.rand(shape, generator=generator)
    else:
        fan_in = prod(shape[1:]) if shape[0] > 1 else 1  # a single row is a trained token
        values = torch.randn(shape, generator=generator) / max(fan_in, 1) ** 0.5
    return values.to(tensor.dtype)


def _save(tensors: dict[str, Tensor], path: Path) -> None:
    if path.suffix.lower() in PICKLE_SUFFIXES:
        torch.save(tensors, path)
    else:
        path.write_bytes(save(tensors, metadata={"format": "pt"}))


def tiny_shapes(checkpoint: CheckpointSpec, wanted: Mapping[str, Shape]) -> dict[str, Shape]:
    """Return a dict published key -> small shape, in the layout's order: the tensors of a file that converts to the
    small module.

    A published key is included if the module has a parameter made from it, or if the rules drop it explicitly.

    Args:
        checkpoint: the layout; without rules it needs no layout file, since the keys are the module's own.
        wanted: own key -> shape of the small module.

    Raises:
        ValueError: the published keys are unknown, or no small shape of a key satisfies its rule.
        KeyMismatch: the rules do not produce the keys and shapes of the module.
    """
    rules, published = rules_of(checkpoint), layout_of(checkpoint)
    if not published:
        if rules:
            raise ValueError(
                f"checkpoint {checkpoint.name!r} has rules and no layout, so its published keys are unknown. "
                f"Add a layout to its CheckpointSpec."
            )
        return dict(wanted)
    plan = convert.plan(rules, published)
    steps: dict[tuple[str, ...], list[str]] = {}
    for key, target in plan.targets.items():
        steps.setdefault(target.sources, []).append(key)
    small: dict[str, Shape] = {}
    for sources, keys in steps.items():
        if sources and any(key in wanted for key in keys):
            targets = [(plan.targets[key].shape, wanted.get(key)) for key in keys]
            full = [published[source] for source in sources]
            try:
                shrunk = _shrink(plan.targets[keys[0]].rule, full, targets)
            except ValueError as error:
                raise ValueError(f"checkpoint {checkpoint.name!r}, key {sources[0]!r}: {error}") from None
            small.update(zip(sources, shrunk, strict=True))
    extents = _small_extents((published[key], small[key]) for key in small)
    small |= {
        key: tuple(extents.get(extent, min(extent, _MAX_DROPPED_EXTENT)) for extent in published[key])
        for key in plan.dropped
    }
    ordered = {key: small[key] for key in published if key in small}
    convert.check(convert.plan(rules, ordered), wanted, where=f"the tiny file of checkpoint {checkpoint.name!r}")
    return ordered


def _shrink(rule: Rule, full: Sequence[Shape], targets: Sequence[tuple[Shape, Shape | None]]) -> tuple[Shape, ...]:
    """Return a tuple of small shapes, one for each source tensor, from which the rule makes the small shapes in
    `targets`; a target whose small shape is None may get any.

    Raises:
        ValueError: there are none.
    """
    ratios = [pair for large, small in targets if small is not None for pair in zip(large, small, strict=False)]
    extents = [extent for shape in full for extent in shape]
    proposals = itertools.product(*(_candidates(extent, ratios) for extent in extents))
    for proposal in itertools.islice(proposals, _MAX_PROPOSALS):
        rest = iter(proposal)
        sources = tuple(tuple(itertools.islice(rest, len(shape))) for shape in full)
        if _makes(rule, sources, [small for _, small in targets]):
            return sources
    small = ", ".join(str(target) for _, target in targets)
    raise ValueError(
        f"no small shape in place of {full[0]} is converted by {type(rule).__name__} to {small}. "
        f"Change ModelSpec.tiny, or write the rule without fixed extents."
    )


def _candidates(extent: int, ratios: Sequence[tuple[int, int]]) -> list[int]:
    """Return a list of small sizes to try, best first, for an axis of `extent`, given (full, small) `ratios`."""
    same = [small for large, small in ratios if large == extent]
    scaled = [extent * small // large for large, small in ratios if large and extent * small % large == 0]
    return list(dict.fromkeys([*same, *scaled, extent]))


def _makes(rule: Rule, sources: tuple[Shape, ...], targets: Sequence[Shape | None]) -> bool:
    try:
        made = rule.shapes(*sources)
    except (ValueError, IndexError, KeyMismatch):
        return False
    return all(small in (None, shape) for shape, small in zip(made, targets, strict=True))


def _small_extents(pairs: Iterable[tuple[Shape, Shape]]) -> dict[int, int]:
    """Return a dict full size of an axis -> the small size that most often replaces it in `pairs` of (full, small)
    shapes.
    """
    counts: dict[int, Counter[int]] = {}
    for large, small in pairs:
        for before, after in zip(large, small, strict=True):
            counts.setdefault(before, Counter())[after] += 1
    return {before: counted.most_common(1)[0][0] for before, counted in counts.items()}
