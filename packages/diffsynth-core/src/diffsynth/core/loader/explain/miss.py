"""Why a file was not recognised, in one sentence that says what to do: the first reason that applies. No torch."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from diffsynth.core.loader.explain import lora, nearest
from diffsynth.core.loader.layouts import scaled
from diffsynth.spec import ArchitectureSpec, CheckpointSpec

if TYPE_CHECKING:
    from diffsynth.core.loader.header import Header

_OPTIMIZER_MARKS = (".exp_avg", ".exp_avg_sq", ".momentum_buffer", ".state1", ".state2", ".step")


@dataclass(frozen=True)
class Miss:
    """A file that no architecture claims, and what was tried.

    Args:
        header: of the file.
        architectures: that are installed, by name.
        checkpoints: their published layouts.
        refusals: why structure said no, by checkpoint and prefix.
        views: the keys with each wrapper prefix taken off, and that prefix.
    """

    header: Header
    architectures: Mapping[str, ArchitectureSpec]
    checkpoints: Sequence[CheckpointSpec]
    refusals: Mapping[tuple[str, str], str]
    views: Sequence[tuple[str, Mapping[str, tuple[int, ...]]]]

    @property
    def where(self) -> str:
        """The file, for the message."""
        return self.header.where


def explain(miss: Miss) -> str:
    """What the file is, or what it comes nearest to."""
    return next(text for reason in REASONS if (text := reason(miss)))


def _no_tensors(miss: Miss) -> str:
    return "" if miss.header.tensors else f"{miss.where} holds no tensors."


def _optimizer_state(miss: Miss) -> str:
    keys = miss.header.tensors
    marked = sum(key.endswith(_OPTIMIZER_MARKS) or key.startswith(("optimizer", "exp_avg")) for key in keys)
    if marked <= len(keys) / 2:
        return ""
    return f"{miss.where} is an optimizer state, not a model checkpoint. The weights are in another file of that run."


def _lora(miss: Miss) -> str:
    return lora.explain(miss.where, miss.header.shapes, miss.checkpoints)


def _packed(miss: Miss) -> str:
    if not (name := scaled.packed_format(miss.header.tensors)):
        return ""
    return f"{miss.where} is quantised with {name}, which packs its weights; use a file in bf16 or scaled fp8."


def _not_installed(miss: Miss) -> str:
    from diffsynth.core.loader import first_party  # reads metadata of every distribution: only for a miss

    home = first_party.whose_keys(miss.header.tensors)
    return f"{miss.where}: {home}" if home else ""


def _nearest(miss: Miss) -> str:
    return nearest.explain(miss.where, miss.views, miss.checkpoints, miss.refusals)


REASONS: tuple[Callable[[Miss], str], ...] = (_no_tensors, _optimizer_state, _lora, _packed, _not_installed, _nearest)
"""Asked in this order; each gives a sentence or nothing, the last always a sentence."""
