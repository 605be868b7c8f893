"""The differences between the keys and shapes that a file has and those that are wanted, for error messages."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from diffsynth.errors import shortened


@dataclass(frozen=True)
class KeyDifferences:
    """Keys that do not fit; false if there are none.

    Args:
        missing: wanted keys that the file does not have.
        unknown: keys of the file that are not wanted.
        wrong_shape: one text for each key whose shape differs, `"bias is (3,), expected (4,)"`.
    """

    missing: Sequence[str] = ()
    unknown: Sequence[str] = ()
    wrong_shape: Sequence[str] = ()

    def __bool__(self) -> bool:
        return bool(self.missing or self.unknown or self.wrong_shape)

    def describe(self, limit: int = 4) -> str:
        """Return a text such as `"2 missing (a, b); 9 unknown (a, b, c, d and 5 more)"`, with `limit` keys of each kind
        at most; empty if nothing differs.

        Args:
            limit: how many keys of each kind are named.
        """
        kinds = {"missing": self.missing, "wrong shape": self.wrong_shape, "unknown": self.unknown}
        return "; ".join(f"{len(keys)} {kind} ({shortened(keys, limit)})" for kind, keys in kinds.items() if keys)


def key_differences(found: Mapping[str, Any], wanted: Mapping[str, Any]) -> KeyDifferences:
    """Return the `KeyDifferences` of two dicts key -> shape: keys only in `wanted`, only in `found`, or with different
    shapes.

    Args:
        found: key -> shape of the file.
        wanted: key -> shape of the module or layout that the file is compared with.
    """
    return KeyDifferences(
        missing=[key for key in wanted if key not in found],
        unknown=[key for key in found if key not in wanted],
        wrong_shape=[
            f"{key} is {found[key]}, expected {shape}"
            for key, shape in wanted.items()
            if key in found and found[key] != shape
        ],
    )
