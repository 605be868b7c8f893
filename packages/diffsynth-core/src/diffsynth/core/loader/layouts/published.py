"""What a published layout says: its keys and shapes, and its rules. No torch."""

from __future__ import annotations

import functools
import gzip
import importlib.resources
import json
import re
from collections.abc import Mapping, Sequence

from diffsynth.core.loader import convert
from diffsynth.spec import CheckpointSpec, resolve

Shape = tuple[int, ...]


def layout_of(checkpoint: CheckpointSpec) -> Mapping[str, Shape]:
    """Key -> shape of the published file; empty if the plugin ships none."""
    return _read(checkpoint.layout) if checkpoint.layout else {}


def rules_of(checkpoint: CheckpointSpec) -> Sequence[convert.Rule]:
    """How its keys become the architecture's own; none if they are."""
    return resolve(checkpoint.rules) if checkpoint.rules else ()


def normal(key: str) -> str:
    """A key with every index alike."""
    return _DIGITS.sub("N", key)


_DIGITS = re.compile(r"\d+")


@functools.lru_cache(maxsize=256)
def _read(layout: str) -> Mapping[str, Shape]:
    package, _, path = layout.partition(":")
    data = importlib.resources.files(package).joinpath(path).read_bytes()
    return {key: tuple(shape) for key, shape in json.loads(gzip.decompress(data))["tensors"].items()}
