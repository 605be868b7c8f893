"""Shapes of the tensors in a file, from which an architecture's `infer_config` derives its config. Light: no torch."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TypeAlias

Shapes: TypeAlias = Mapping[str, tuple[int, ...]]
"""Tensor name, in the architecture's own naming -> shape."""


def count_items(shapes: Shapes, prefix: str) -> int:
    """Return the number of items of the module list `prefix`: the highest INDEX of keys "prefix.INDEX.…" plus 1; 0
    without any.
    """
    depth = prefix.count(".") + 1
    return max((int(key.split(".")[depth]) for key in shapes if key.startswith(f"{prefix}.")), default=-1) + 1
