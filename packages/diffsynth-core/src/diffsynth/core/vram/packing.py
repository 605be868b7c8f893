"""The parameters of a block in one stretch of memory, so that one copy moves them."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

ALIGNMENT = 256
"""Elements, so that a tensor is aligned alike in both dtypes it can have: kernels are chosen by alignment, too."""


@dataclass(frozen=True)
class PackedTensorInfo:
    """The place of one tensor.

    Args:
        shape, stride: of the tensor.
        stored, computed: its dtypes at rest and in use.
        group: which run of equal dtypes it is part of.
        first: its first element in that run.
    """

    shape: torch.Size
    stride: tuple[int, ...]
    stored: torch.dtype
    computed: torch.dtype
    group: int
    first: int


@dataclass(frozen=True)
class Group:
    """A run of tensors that share both dtypes: converted by one copy."""

    stored: torch.dtype
    computed: torch.dtype
    count: int
    stored_start: int
    computed_start: int


class Packing:
    """Where each parameter of a block lies, at rest and in use.

    Args:
        tensors: by name; only shape, stride and dtype are read.
        dtypes: name -> (stored, computed).
    """

    def __init__(self, tensors: Mapping[str, Tensor], dtypes: Mapping[str, tuple[torch.dtype, torch.dtype]]) -> None:
        pairs = list(dict.fromkeys(dtypes[name] for name in tensors))
        counts = [0] * len(pairs)
        self.slots: dict[str, PackedTensorInfo] = {}
        for name, tensor in tensors.items():
            group = pairs.index(dtypes[name])
            stride = tensor.stride() if _is_dense(tensor) else torch.empty(tensor.shape, device="meta").stride()
            self.slots[name] = PackedTensorInfo(tensor.shape, stride, *dtypes[name], group, counts[group])
            counts[group] += -(-tensor.numel() // ALIGNMENT) * ALIGNMENT
        self.groups: list[Group] = []
        stored_start = computed_start = 0
        for (stored, computed), count in zip(pairs, counts, strict=True):
            self.groups.append(Group(stored, computed, count, stored_start, computed_start))
            stored_start += count * stored.itemsize
            computed_start += count * computed.itemsize
        self.stored_bytes = stored_start
        self.computed_bytes = computed_start

    @property
    def converts(self) -> bool:
        """Whether a tensor is used in another dtype than it is kept in."""
        return any(group.stored != group.computed for group in self.groups)

    def stored_views(self, memory: Tensor) -> dict[str, Tensor]:
        """The tensors at rest in a stretch of `stored_bytes` bytes."""
        runs = [_run(memory, group.stored_start, group.count, group.stored) for group in self.groups]
        return {name: _view(runs[slot.group], slot) for name, slot in self.slots.items()}

    def computed_views(self, memory: Tensor) -> dict[str, Tensor]:
        """The tensors in use in a stretch of `computed_bytes` bytes."""
        runs = [_run(memory, group.computed_start, group.count, group.computed) for group in self.groups]
        return {name: _view(runs[slot.group], slot) for name, slot in self.slots.items()}

    def convert(self, stored: Tensor, computed: Tensor) -> None:
        """From rest to use, a copy a group."""
        for group in self.groups:
            source = _run(stored, group.stored_start, group.count, group.stored)
            _run(computed, group.computed_start, group.count, group.computed).copy_(source)


def _run(memory: Tensor, start: int, count: int, dtype: torch.dtype) -> Tensor:
    return memory[start : start + count * dtype.itemsize].view(dtype)


def _view(run: Tensor, slot: PackedTensorInfo) -> Tensor:
    return run.as_strided(slot.shape, slot.stride, run.storage_offset() + slot.first)


def _is_dense(tensor: Tensor) -> bool:
    """Whether its strides only permute its axes, as in channels-last: then they are kept."""
    axes = sorted(zip(tensor.stride(), tensor.shape, strict=True))
    expected = 1
    for stride, size in axes:
        if size != 1 and stride != expected:
            return False
        expected *= size
    return math.prod(tensor.shape) > 0
