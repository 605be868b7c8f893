"""Cache of the results of frozen units: computed once per row and stored as safetensors files."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from diffsynth.core.replacing import replacing
from diffsynth.errors import TrainingError
from diffsynth.runtime.pipeline import Pipeline
from diffsynth.runtime.schema.annotations import as_json
from diffsynth.runtime.unit import Unit, split
from diffsynth.terminal import module_logger
from diffsynth_train.components import Component
from diffsynth_train.data.dataset import Dataset

logger = module_logger(__name__)

Row = tuple[dict[str, Tensor], dict[str, Any]]
"""Cached values of one row: tensors without the batch axis, and JSON values."""


def split_units(units: Sequence[Unit], trained: set[str], varied: frozenset[str]) -> tuple[list[Unit], list[Unit]]:
    """Return ([units whose results can be cached], [units to run in each step]), both in the order of `units`; the
    latter use a trained role or random numbers, or depend on an argument in `varied` or on such a unit.
    """
    frozen, live = split(units, trained)
    cacheable: list[Unit] = []
    live_names = set(varied) | {name for step in live for name in step.writes}
    for step in frozen:
        if {read.name for read in step.reads} & live_names:
            live_names.update(step.writes)
        else:
            cacheable.append(step)
    return cacheable, [step for step in units if step not in cacheable]


class UnitCache:
    """Results of frozen units for every row of the dataset.

    Args:
        folder: folder with one file per row, named by a hash of content, units and weights; None for memory only.
        pipe: pipeline that runs the units.
        units: the frozen units, in order.
        components: components by role; their identities are part of the file names.
    """

    def __init__(
        self, folder: Path | None, pipe: Pipeline, units: Sequence[Unit], components: Mapping[str, Component]
    ) -> None:
        self._folder = folder
        self._pipe = pipe
        self._units = tuple(units)
        self._writes = {name for step in units for name in step.writes}
        roles = {role for step in units for role in step.roles}
        weights = sorted((role, components[role].identity) for role in roles if role in components)
        self._salt = json.dumps([[step.name for step in units], weights]).encode()
        self._rows: dict[int, Row] = {}

    def fill(self, dataset: Dataset, batch_size: int) -> None:
        """Put the units' results for all rows (samples) of `dataset` into memory: read from the cache folder, or
        computed and, if there is a folder, written to it; do nothing without units.

        A run with the same cache folder, content, units and weights finds all of them.
        """
        if not self._units:
            return
        missing = [index for index in range(len(dataset)) if not self._read(index, dataset)]
        logger.info("%d of %d rows are cached; computing %d", len(dataset) - len(missing), len(dataset), len(missing))
        for start in range(0, len(missing), batch_size):
            indices = missing[start : start + batch_size]
            for index, row in zip(indices, self._compute(dataset.batch(indices), len(indices)), strict=True):
                self._rows[index] = row
                self._write(index, dataset, row)

    def batch(self, indices: Sequence[int]) -> dict[str, Any]:
        """Return a dict name -> cached value for some rows (samples): tensors stacked along a batch axis, and numbers
        or texts, which must be equal in all rows; empty if nothing is cached.

        Rows that were encoded with others have different numbers of tokens. Tensors as long as a mask are padded behind
        the longest row with zeros, which is False in the mask.

        Raises:
            TrainingError: rows of the batch differ in a plain value, or in the shape of a tensor without a mask.
        """
        if not self._units:
            return {}
        rows = [self._rows[index] for index in indices]
        plain = rows[0][1]
        if any(row[1] != plain for row in rows):
            raise TrainingError(f"rows of one batch differ: {plain} and others; set one height and width in [data]")
        return _stacked([row[0] for row in rows]) | plain

    @torch.no_grad()
    def _compute(self, values: Mapping[str, Any], size: int) -> list[Row]:
        on_device = {k: v.to(self._pipe.device) if isinstance(v, Tensor) else v for k, v in values.items()}
        written = self._pipe.run_units(self._units, {**on_device, "batch_size": size})
        # A unit whose role is empty, or whose argument is not given, does not run and writes nothing.
        results = {name: written[name] for name in self._writes if name in written}
        tensors = {name: value.cpu() for name, value in results.items() if isinstance(value, Tensor)}
        # As they are read from a file, so that rows of both kinds are equal.
        plain = {name: as_json(value) for name, value in results.items() if not isinstance(value, Tensor)}
        plain = {name: value for name, value in plain.items() if value is not NotImplemented}
        if left := set(results) - set(tensors) - set(plain):
            raise TrainingError(
                f"units {[step.name for step in self._units]} write {sorted(left)}, which cannot be cached"
            )
        for name, tensor in tensors.items():
            if len(tensor) != size:
                raise TrainingError(f"cached value {name!r} has {len(tensor)} rows for a batch of {size}")
        return [({name: tensor[i].clone() for name, tensor in tensors.items()}, plain) for i in range(size)]

    def _path(self, index: int, dataset: Dataset) -> Path | None:
        if self._folder is None:
            return None
        key = hashlib.sha256(self._salt + b"\0" + dataset.fingerprint(index)).hexdigest()
        return self._folder / f"{key}.safetensors"

    def _read(self, index: int, dataset: Dataset) -> bool:
        path = self._path(index, dataset)
        if path is None or not path.is_file():
            return False
        with safe_open(path, framework="pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            plain = json.loads(file.metadata()["values"])
        self._rows[index] = (tensors, plain)
        return True

    def _write(self, index: int, dataset: Dataset, row: Row) -> None:
        path = self._path(index, dataset)
        if path is None:
            return
        path.parent.mkdir(parents=True, exist_ok=True)
        with replacing(path) as partial:
            save_file(row[0], partial, metadata={"values": json.dumps(row[1])})


def _stacked(rows: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]:
    masks = [name for name, value in rows[0].items() if value.dtype == torch.bool and value.ndim == 1]
    stacked = {}
    for name in rows[0]:
        values = [row[name] for row in rows]
        if len({value.shape for value in values}) > 1:
            is_masked = any(all(len(row[name]) == len(row[mask]) for row in rows) for mask in masks)
            if not is_masked or len({value.shape[1:] for value in values}) > 1:
                raise TrainingError(
                    f"rows of one batch differ: {name} is {' and '.join(map(str, _shapes(values)))}, without a mask"
                )
            longest = max(map(len, values))
            values = [F.pad(value, (0, 0) * (value.ndim - 1) + (0, longest - len(value))) for value in values]
        stacked[name] = torch.stack(values)
    return stacked


def _shapes(values: Sequence[Tensor]) -> list[tuple[int, ...]]:
    return sorted({tuple(value.shape) for value in values})
