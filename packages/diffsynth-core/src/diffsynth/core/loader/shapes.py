"""Shapes of the tensors in a file, from which an architecture's `infer_config` derives its config. Light: no torch."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TypeAlias

Shapes: TypeAlias = Mapping[str, tuple[int, ...]]
"""Tensor name, in the architecture's own naming -> shape."""


def count_items(shapes: Shapes, prefix: str) -> int:
    """Return the number of items of the module list `prefix`: the highest INDEX of keys "prefix.INDEX.…" plus 1; 0
    without any.

    Raises:
        ValueError: most numbers below the highest are missing, as in no module list.
    """
    depth = prefix.count(".") + 1
    found = {int(key.split(".")[depth]) for key in shapes if key.startswith(f"{prefix}.")}
    count = max(found, default=-1) + 1
    if count > 4 * len(found) + 16:
        raise ValueError(f"it has {len(found)} items of {prefix}, and one has the number {count - 1:.6g}")
    return count
