"""The layout of a block's parameters in one contiguous buffer, so that one copy moves them all."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

ALIGNMENT = 256
"""Elements to which tensors are aligned in stored and computed dtype alike: kernels are chosen by alignment, too."""


@dataclass(frozen=True)
class PackedTensorInfo:
    """The position of one tensor in the buffer.

    Args:
        shape: shape of the tensor.
        stride: its stride, in elements.
        stored: dtype in which it is stored and copied.
        computed: dtype in which it is computed with.
        group: index of its group.
        first: index of its first element in the group.
    """

    shape: torch.Size
    stride: tuple[int, ...]
    stored: torch.dtype
    computed: torch.dtype
    group: int
    first: int


@dataclass(frozen=True)
class Group:
    """Adjacent tensors that share both dtypes, so that one copy converts them.

    Args:
        stored: dtype in which they are stored.
        computed: dtype in which they are computed with.
        count: number of elements, padding included.
        stored_start: offset in the stored buffer, in bytes.
        computed_start: offset in the computed buffer, in bytes.
    """

    stored: torch.dtype
    computed: torch.dtype
    count: int
    stored_start: int
    computed_start: int


class Packing:
    """Layout of the parameters of a block, in a buffer of stored dtypes and in one of computed dtypes.

    Args:
        tensors: tensors by name; only shape and stride are read.
        dtypes: name -> (stored dtype, computed dtype).
    """

    def __init__(self, tensors: Mapping[str, Tensor], dtypes: Mapping[str, tuple[torch.dtype, torch.dtype]]) -> None:
        pairs = list(dict.fromkeys(dtypes[name] for name in tensors))
        counts = [0] * len(pairs)
        self.tensors: dict[str, PackedTensorInfo] = {}
        for name, tensor in tensors.items():
            group = pairs.index(dtypes[name])
            stride = tensor.stride() if _is_dense(tensor) else torch.empty(tensor.shape, device="meta").stride()
            self.tensors[name] = PackedTensorInfo(tensor.shape, stride, *dtypes[name], group, counts[group])
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
        """Whether any tensor of the block has a computed dtype other than its stored dtype."""
        return any(group.stored != group.computed for group in self.groups)

    def stored_views(self, memory: Tensor) -> dict[str, Tensor]:
        """Return a dict name -> tensor in its stored dtype, each a view of `memory`, which must have `stored_bytes`
        bytes or more.
        """
        groups = [_view(memory, group.stored_start, group.count, group.stored) for group in self.groups]
        return {name: _tensor(groups[info.group], info) for name, info in self.tensors.items()}

    def computed_views(self, memory: Tensor) -> dict[str, Tensor]:
        """Return a dict name -> tensor in its computed dtype, each a view of `memory`, which must have `computed_bytes`
        bytes or more.
        """
        groups = [_view(memory, group.computed_start, group.count, group.computed) for group in self.groups]
        return {name: _tensor(groups[info.group], info) for name, info in self.tensors.items()}

    def convert(self, stored: Tensor, computed: Tensor) -> None:
        """Cast the weights in buffer `stored` to their computed dtypes and write them into buffer `computed`, one copy
        for each pair of dtypes.
        """
        for group in self.groups:
            source = _view(stored, group.stored_start, group.count, group.stored)
            _view(computed, group.computed_start, group.count, group.computed).copy_(source)


def _view(memory: Tensor, start: int, count: int, dtype: torch.dtype) -> Tensor:
    return memory[start : start + count * dtype.itemsize].view(dtype)


def _tensor(group: Tensor, info: PackedTensorInfo) -> Tensor:
    return group.as_strided(info.shape, info.stride, group.storage_offset() + info.first)


def _is_dense(tensor: Tensor) -> bool:
    """Whether `tensor` has elements and fills its memory without gaps, in any order of its axes (channels-last counts,
    too).
    """
    axes = sorted(zip(tensor.stride(), tensor.shape, strict=True))
    expected = 1
    for stride, size in axes:
        if size != 1 and stride != expected:
            return False
        expected *= size
    return math.prod(tensor.shape) > 0
