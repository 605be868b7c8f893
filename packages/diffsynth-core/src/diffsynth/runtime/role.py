"""Roles: the names under which a pipeline holds its components, and what may fill them."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Role:
    """A module: any of these architectures may fill it. An optional one may stay empty."""

    architectures: tuple[str, ...]
    optional: bool = False


@dataclass(frozen=True, kw_only=True)
class Processor:
    """A tokenizer or processor that comes as a folder.

    Args:
        source: where it is unless `from_pretrained(<role>_config=...)` says otherwise.
        loader: reference to a class with `from_pretrained(folder)`.
        optional: may stay empty.
    """

    source: str
    loader: str = "transformers:AutoTokenizer"
    optional: bool = False
