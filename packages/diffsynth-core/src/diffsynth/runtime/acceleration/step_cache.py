"""The interface of step caches: `StepCache` holds the settings, a `CacheStrategy` decides which steps skip blocks.

A strategy serves one branch of one network. It reads only the inputs and outputs of the network's stacks of blocks, so
it works with any model.
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
"""The hidden states that a block passes to the next one: one tensor, or one per modality."""


@dataclass(frozen=True, kw_only=True)
class StepCache:
    """The settings of a step cache, for a call's argument `step_cache`."""

    def refuses(self, model: ModelSpec | None) -> str | None:
        """Return the reason why this step cache cannot serve a model, as text, or None if it can, as in this base
        class.

        Args:
            model: None for a pipeline of files or components, which has no model name.
        """
        return None

    def strategy(self, model: ModelSpec | None) -> CacheStrategy:
        """Return a new `CacheStrategy` for one branch of one network, as subclasses define it.

        `refuses(model)` returned None before.
        """
        raise NotImplementedError


@dataclass
class ForwardPattern:
    """The signature of the blocks of a stack, as far as streams are concerned.

    Args:
        indices: of the streams among a block's arguments, in the order in which they are returned.
        is_tuple: whether blocks return a tuple.
    """

    indices: tuple[int, ...]
    is_tuple: bool

    def streams(self, values: Sequence[Any]) -> Streams:
        """Return a tuple of those tensors among a block's arguments `values` that are streams (hidden states)."""
        return tuple(values[index] for index in self.indices)

    def result(self, streams: Streams) -> Any:
        """Return `streams` as a block returns them: the tuple itself, or its only tensor if blocks return no tuple."""
        return streams if self.is_tuple else streams[0]


@dataclass
class FirstBlockCall:
    """The call of the first block in a forward pass of the network, from which a strategy decides.

    Args:
        index: of the forward pass in this branch, from 0.
        is_last: whether this is the last step of the schedule.
        arguments: of the block, by name.
        values: the same arguments, in order.
        block: the block.
        run: runs the block and returns its result.
        pattern_of: from the result of the block to its pattern.
    """

    index: int
    is_last: bool
    arguments: Mapping[str, Any]
    values: Sequence[Any]
    block: nn.Module
    run: Callable[[], Any]
    pattern_of: Callable[[Any], ForwardPattern]

    @cached_property
    def result(self) -> Any:
        """The result of the block as its `forward` returns it; the block runs at the first access only."""
        return self.run()

    @property
    def streams(self) -> Streams:
        """A tuple of the streams (hidden-state tensors) that the block takes; the first access runs the block.

        The block runs for them, because its result shows which arguments they are.
        """
        return self.pattern_of(self.result).streams(self.values)

    @property
    def output(self) -> Streams:
        """A tuple of the streams (hidden-state tensors) that the block returns; the first access runs the block."""
        return as_streams(self.result)

    def output_of(self, name: str) -> Tensor:
        """Run the block, which must not have run before, and return the output tensor of its submodule `name`."""
        seen: dict[int, Tensor] = {}

        def see(module: nn.Module, inputs: Any, output: Tensor) -> None:
            seen[threading.get_ident()] = output  # other threads may be in the same block

        handle = self.block.get_submodule(name).register_forward_hook(see)
        try:
            _ = self.result
        finally:
            handle.remove()
        return seen[threading.get_ident()]


class CacheStrategy:
    """The decision which forward passes skip blocks, and the prediction of their results.

    This base class predicts that each stack changes its streams as it did when it last ran.
    """

    after_first = False
    """Whether the first block always runs, so that the change of its stack is counted from that block's output."""

    def __init__(self) -> None:
        self._changes: dict[int, Streams] = {}

    def reuses(self, first_call: FirstBlockCall) -> bool:
        """Whether this forward pass skips the stacks; called in each pass, ignored until every stack has run once."""
        raise NotImplementedError

    def computed(self, stack: int, index: int, start: Streams, end: Streams) -> None:
        """Record, for `predicted`, the change `end - start` of a stack's streams (hidden states) in forward pass
        `index`.
        """
        self._changes[stack] = difference(end, start)

    def predicted(self, stack: int, index: int, start: Streams) -> Streams:
        """Return a tuple of tensors, the predicted streams after a skipped stack: `start` plus its last recorded
        change.
        """
        return tuple(before + change for before, change in zip(start, self._changes[stack], strict=True))


def as_streams(result: Any) -> Streams:
    """Return a block's `result`, one tensor or a tuple or list of tensors, as a tuple of tensors."""
    return tuple(result) if isinstance(result, tuple | list) else (result,)


def difference(now: Streams, before: Streams) -> Streams:
    """Return a tuple of tensors, `now - before` for each stream (hidden state)."""
    return tuple(a - b for a, b in zip(now, before, strict=True))


def relative_change(now: Streams, before: Streams) -> float:
    """Return a float, `sum |now - before| / sum |before|` over all streams, in fp32; infinite if shapes differ.

    This synchronizes with the GPU.
    """
    if any(a.shape != b.shape for a, b in zip(now, before, strict=True)):
        return float("inf")
    moved = sum((a.float() - b.float()).abs().sum() for a, b in zip(now, before, strict=True))
    size = sum(b.float().abs().sum() for b in before)
    return float(moved / size)
