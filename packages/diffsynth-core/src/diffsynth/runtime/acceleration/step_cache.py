"""What a step cache is: a rule for when a stack of blocks need not run, and for what it would have given.

A rule sees one branch of one network, and of that network only what goes into its stacks and what comes out. It knows
no model, and no model knows it.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from torch import Tensor, nn

from diffsynth.spec import ModelSpec

Streams = tuple[Tensor, ...]
"""What blocks hand on: one tensor, or one per modality."""


@dataclass(frozen=True, kw_only=True)
class StepCache:
    """The settings of a step cache, given as a call's `step_cache`."""

    def refuses(self, model: ModelSpec | None) -> str | None:
        """Why this cache cannot serve a model, or None if it can.

        Args:
            model: None for a pipeline that was put together from files.
        """
        return None

    def strategy(self, model: ModelSpec | None) -> CacheStrategy:
        """A new rule, which remembers nothing yet; for a model that was not refused."""
        raise NotImplementedError


@dataclass
class ForwardPattern:
    """How the blocks of a stack hand on their streams: as which arguments, and whether in a tuple."""

    places: tuple[int, ...]
    is_tuple: bool

    def streams(self, values: Sequence[Any]) -> Streams:
        """The streams among a block's arguments."""
        return tuple(values[place] for place in self.places)

    def result(self, streams: Streams) -> Any:
        """Streams as a block gives them."""
        return streams if self.is_tuple else streams[0]


@dataclass
class FirstBlockCall:
    """What a rule may ask about one call of the network, at its first block.

    Args:
        index: how many calls of this branch there were before.
        is_last: whether this is the last step of the schedule.
        arguments: of the block, by name.
        values: the same, in order.
        block: the block.
        run: runs it.
        form_of: from what it gives to its form.
    """

    index: int
    is_last: bool
    arguments: Mapping[str, Any]
    values: Sequence[Any]
    block: nn.Module
    run: Callable[[], Any]
    pattern_of: Callable[[Any], ForwardPattern]

    @cached_property
    def given(self) -> Any:
        """What the block gives; it runs once, however often it is asked."""
        return self.run()

    @property
    def streams(self) -> Streams:
        """What goes into the block; it runs if its form is not known yet."""
        return self.pattern_of(self.given).streams(self.values)

    @property
    def output(self) -> Streams:
        """What the block makes of its streams."""
        return as_streams(self.given)

    def output_of(self, name: str) -> Tensor:
        """What a submodule of the block gives while the block runs."""
        seen: dict[int, Tensor] = {}

        def see(module: nn.Module, inputs: Any, output: Tensor) -> None:
            seen[threading.get_ident()] = output  # other threads may be in the same block

        handle = self.block.get_submodule(name).register_forward_hook(see)
        try:
            _ = self.given
        finally:
            handle.remove()
        return seen[threading.get_ident()]


class CacheStrategy:
    """When to reuse, and what: the change that each stack made to its streams when it last ran.

    `after_first` says that the change of the deciding stack is counted from its first block's output, and that this
    block always runs.
    """

    after_first = False

    def __init__(self) -> None:
        self._changes: dict[int, Streams] = {}

    def reuses(self, first_call: FirstBlockCall) -> bool:
        """Whether the stacks of this call are to be left out. Asked at every call; the first runs whole anyway."""
        raise NotImplementedError

    def computed(self, stack: int, index: int, start: Streams, end: Streams) -> None:
        """Remember what a stack made of its streams in call `index`."""
        self._changes[stack] = difference(end, start)

    def predicted(self, stack: int, index: int, start: Streams) -> Streams:
        """What a stack would make of its streams in call `index`."""
        return tuple(before + change for before, change in zip(start, self._changes[stack], strict=True))


def as_streams(given: Any) -> Streams:
    """What a block gave, as streams."""
    return tuple(given) if isinstance(given, tuple | list) else (given,)


def difference(now: Streams, before: Streams) -> Streams:
    """`now - before`, stream by stream."""
    return tuple(a - b for a, b in zip(now, before, strict=True))


def relative_change(now: Streams, before: Streams) -> float:
    """`sum |now - before| / sum |before|` over all streams, in fp32; infinite if shapes differ. Waits for the GPU."""
    if any(a.shape != b.shape for a, b in zip(now, before, strict=True)):
        return float("inf")
    moved = sum((a.float() - b.float()).abs().sum() for a, b in zip(now, before, strict=True))
    size = sum(b.float().abs().sum() for b in before)
    return float(moved / size)
