"""A step cache in one call of a pipeline: blocks run, or their results are predicted.

Layers around the `forward` of each block (`diffsynth.core.forward_chain`) skip blocks without changes of the network's
code. They are installed while a call with a step cache runs, and read a context variable to find the cache of their own
thread's call, so concurrent calls do not see each other's caches. They are outside of the layers that stream weights,
so the weights of a skipped block are not loaded.
"""

from __future__ import annotations

import functools
import inspect
import threading
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

from diffsynth.core import forward_chain
from diffsynth.core.forward_chain import ForwardLayer
from diffsynth.errors import Refused
from diffsynth.runtime.acceleration.step_cache import (
    CacheStrategy,
    FirstBlockCall,
    ForwardPattern,
    StepCache,
    Streams,
    as_streams,
)
from diffsynth.runtime.acceleration.strategies import model_named
from diffsynth.runtime.architectures import Stack, architecture_of, cached_stacks
from diffsynth.spec import ModelSpec

_call: ContextVar[ForwardPass | None] = ContextVar("diffsynth_step_cache", default=None)
_users: dict[int, int] = {}
"""`id` of a block with a layer -> number of calls in progress that use it."""

_lock = threading.Lock()


def step_cache_session(
    cache: StepCache | None, components: Mapping[str, Any], roles: Collection[str], model_name: str | None
) -> StepCacheSession:
    """Return a new `StepCacheSession` for one call; if `cache` is None the session does nothing.

    Args:
        cache: the step cache of the call; None caches nothing.
        components: role -> component or None.
        roles: of the networks whose blocks may be skipped.
        model_name: of the pipeline; None for a pipeline of files or components.

    Raises:
        Refused: the cache cannot serve the model or its networks, with the reason.
    """
    if cache is None:
        return StepCacheSession(None)
    model = None if model_name is None else model_named(model_name)
    if (reason := cache.refuses(model)) is not None:
        raise Refused(f"step_cache={cache!r} is refused: {reason}")
    loaded = {role: components[role] for role in roles if isinstance(components.get(role), nn.Module)}
    declared = map(cached_stacks, loaded.values())
    networks = [stacks for stacks in declared if sum(len(stack.blocks) for stack in stacks) > 1]
    if not networks:
        raise Refused(f"step_cache={cache!r} is refused: {_why_nothing_is_skipped(loaded)}")
    return StepCacheSession(cache, networks, model)


def _why_nothing_is_skipped(networks: Mapping[str, nn.Module]) -> str:
    """Return the reason, as text, why a step cache may skip no block of these networks (role -> module)."""
    declared = [architecture_of(module) for module in networks.values()]
    refusing = [each.name for each in declared if each is not None and each.cached_blocks == ()]
    if refusing:
        verb = "declares" if len(refusing) == 1 else "declare"
        return f"{' and '.join(refusing)} {verb} no blocks that a step cache may skip"
    kinds = ", ".join(f"{role} ({type(module).__name__})" for role, module in networks.items())
    return (
        f"{kinds or 'no network'} has no repeated blocks that could be skipped; its architecture names them in "
        "repeated_blocks or cached_blocks"
    )


class StepCacheSession:
    """The step caches of one call.

    Each network has one for each branch and, if an evaluation of a branch calls it repeatedly, for each of these calls.

        with session:
            with session.forward_pass("cond", is_last=False):
                velocity = ...

    Args:
        cache: the settings; None caches nothing.
        networks: the stacks of each network that may be skipped.
        model: of the pipeline, if it has a model name.
    """

    def __init__(
        self, cache: StepCache | None, networks: Sequence[Sequence[Stack]] = (), model: ModelSpec | None = None
    ) -> None:
        self._cache, self._model = cache, model
        self._networks = networks if cache is not None else ()
        self._positions = {
            id(block): BlockPosition(network, stack_index, block_index, stack)
            for network, stacks in enumerate(self._networks)
            for stack_index, stack in enumerate(stacks)
            for block_index, block in enumerate(stack.blocks)
        }
        self._histories: dict[tuple[int, str, int], BranchHistory] = {}
        self._reused: list[str] = []

    def __enter__(self) -> StepCacheSession:
        for block in self._blocks():
            _install_layer(block)
        return self

    def __exit__(self, *error: object) -> None:
        for block in self._blocks():
            _remove_layer(block)

    @contextmanager
    def forward_pass(self, branch: str, *, is_last: bool) -> Iterator[None]:
        """Context manager in which the velocity of a branch is evaluated once, with the step caches of this call.

        Args:
            branch: its name; merged branches have a name of their own.
            is_last: whether this is the last step of the schedule.
        """
        forward_pass = ForwardPass(self, branch, is_last)
        token = _call.set(forward_pass if self._positions else None)
        try:
            yield
        finally:
            _call.reset(token)
        if forward_pass.reused:
            self._reused.append(branch)

    def forget(self) -> None:
        """Delete the histories of all networks and branches: the next forward passes run whole."""
        self._histories.clear()

    def take_reused(self) -> tuple[str, ...]:
        """Return a tuple: names of the branches that skipped blocks since the last call of this method."""
        reused, self._reused = tuple(self._reused), []
        return reused

    def position(self, block: nn.Module) -> BlockPosition | None:
        """Return the `BlockPosition` of a block, or None for a block that is never skipped."""
        return self._positions.get(id(block))

    def history(self, network: int, branch: str, ordinal: int) -> BranchHistory:
        """Return the `BranchHistory` of a network in a branch for its `ordinal`-th call in each pass; made if it is
        new.
        """
        key = (network, branch, ordinal)
        if key not in self._histories:
            assert self._cache is not None
            self._histories[key] = BranchHistory(self._cache.strategy(self._model), len(self._networks[network]))
        return self._histories[key]

    def _blocks(self) -> Iterator[nn.Module]:
        return (block for stacks in self._networks for stack in stacks for block in stack.blocks)


@dataclass(frozen=True)
class BlockPosition:
    """The position of a block.

    Args:
        network: index of its network.
        stack_index: of its stack in the network.
        block_index: in the stack, 0 for the first block.
        stack: its stack.
    """

    network: int
    stack_index: int
    block_index: int
    stack: Stack

    @property
    def is_last(self) -> bool:
        """Whether the block is the last one of its stack."""
        return self.block_index == len(self.stack.blocks) - 1


@dataclass
class BranchHistory:
    """The history of one network in one branch, over all steps of a call.

    Args:
        strategy: decides which forward passes skip blocks.
        num_stacks: number of stacks; all must have run before any may be skipped.
        index: of the current forward pass; -1 before the first.
        decider: index of the stack that the forward pass begins with.
        reusing: whether the current forward pass skips blocks.
        patterns: stack index -> pattern.
        known: indices of the stacks that have run.
        begun: stack index -> arguments and result of its first block in the current forward pass.
        predictions: stack index -> predicted streams after the stack, while the current forward pass skips its blocks.
    """

    strategy: CacheStrategy
    num_stacks: int
    index: int = -1
    decider: int = 0
    reusing: bool = False
    patterns: dict[int, ForwardPattern] = field(default_factory=dict)
    known: set[int] = field(default_factory=set)
    begun: dict[int, tuple[Sequence[Any], Any]] = field(default_factory=dict)
    predictions: dict[int, Streams] = field(default_factory=dict)

    def begin(self, decider: int) -> None:
        """Advance the history to the network's next forward pass; `decider` is the index of its first stack."""
        self.index, self.decider, self.reusing = self.index + 1, decider, False
        self.begun, self.predictions = {}, {}

    def pattern_of(self, stack: int, values: Sequence[Any], result: Any, *, name: str) -> ForwardPattern:
        """Return the `ForwardPattern` of a stack (which arguments are hidden states), found at its first call, then
        kept.
        """
        if stack not in self.patterns:
            self.patterns[stack] = _first_pattern(values, result, name)
        return self.patterns[stack]

    def ran(self, position: BlockPosition, values: Sequence[Any], result: Any) -> None:
        """Update the history after a block ran; after a stack's last block, give the stack's change to the strategy."""
        stack = position.stack_index
        if position.block_index == 0:
            self.pattern_of(stack, values, result, name=position.stack.name)
            self.begun[stack] = (values, result)
        first_values, first_result = self.begun[stack]
        if position.block_index == 1:
            self.patterns[stack] = _confirmed_pattern(self.patterns[stack], values, first_result)
        if position.is_last:
            after_first = stack == self.decider and self.strategy.after_first
            start = as_streams(first_result) if after_first else self.patterns[stack].streams(first_values)
            self.strategy.computed(stack, self.index, start, as_streams(result))
            self.known.add(stack)
            self.begun[stack] = ((), None)  # frees the streams before the next step

    def skipped(self, position: BlockPosition, start: Streams) -> Any:
        """Return the result of a skipped block: the prediction for its whole stack.

        Every block returns it, whatever it takes: what the network adds between two blocks, such as the residuals of a
        ControlNet, is part of the stack's change and must not be added again. A residual after the last block is not.

        Args:
            position: of the block.
            start: the streams that the prediction starts from, if it is the first one that is called.
        """
        stack = position.stack_index
        if stack not in self.predictions:
            self.predictions[stack] = self.strategy.predicted(stack, self.index, start)
        streams = self.predictions.pop(stack) if position.is_last else self.predictions[stack]
        return self.patterns[stack].result(streams)


class ForwardPass:
    """One evaluation of the velocity of a branch.

    Args:
        session: of the call.
        branch: its name.
        is_last: whether this is the last step of the schedule.
    """

    def __init__(self, session: StepCacheSession, branch: str, is_last: bool) -> None:
        self._session, self._branch, self._is_last = session, branch, is_last
        self._open: dict[int, tuple[int, BranchHistory]] = {}
        self.reused = False

    def run(self, block: nn.Module, forward: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        """Return the result of a block, as its `forward` returns it: computed, or predicted from earlier steps."""
        position = self._session.position(block)
        if position is None:
            return forward(*args, **kwargs)
        bound = _signature(type(block)).bind(block, *args, **kwargs)
        values = _flat(bound)
        history, begins = self._history(position)
        if begins:
            return self._decide(history, position, block, functools.partial(forward, *args, **kwargs), bound)
        if history.reusing:
            return history.skipped(position, history.patterns[position.stack_index].streams(values))
        result = forward(*args, **kwargs)
        history.ran(position, values, result)
        return result

    def _history(self, position: BlockPosition) -> tuple[BranchHistory, bool]:
        """Return (`BranchHistory` for a block, whether a call of the network begins with this block)."""
        ordinal, history = self._open.get(position.network, (-1, None))
        again = history is not None and position.block_index == 0 and position.stack_index == history.decider
        if history is not None and not again:
            return history, False
        history = self._session.history(position.network, self._branch, ordinal + 1)
        self._open[position.network] = (ordinal + 1, history)
        history.begin(position.stack_index)
        return history, True

    def _decide(
        self,
        history: BranchHistory,
        position: BlockPosition,
        block: nn.Module,
        run: Callable[[], Any],
        bound: inspect.BoundArguments,
    ) -> Any:
        """Decide whether a network's call is skipped; return the result, computed or predicted, of its first block."""
        values = _flat(bound)
        pattern_of = functools.partial(history.pattern_of, position.stack_index, values, name=position.stack.name)
        first_call = FirstBlockCall(history.index, self._is_last, bound.arguments, values, block, run, pattern_of)
        history.reusing = history.strategy.reuses(first_call) and len(history.known) == history.num_stacks
        if not history.reusing:
            history.ran(position, values, first_call.result)
            return first_call.result
        self.reused = True
        taken = history.patterns[position.stack_index].streams(values)
        return history.skipped(position, first_call.output if history.strategy.after_first else taken)


def _run(block: nn.Module, forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    forward_pass = _call.get()
    return forward(*args, **kwargs) if forward_pass is None else forward_pass.run(block, forward, args, kwargs)


def _install_layer(block: nn.Module) -> None:
    with _lock:
        count = _users.get(id(block), 0)
        if count == 0:
            decorate = functools.partial(functools.partial, _run, block)
            forward_chain.install(block, ForwardLayer.STEP_CACHE, decorate)
        _users[id(block)] = count + 1


def _remove_layer(block: nn.Module) -> None:
    """Remove the step-cache layer around a block's `forward`, unless another call still uses it."""
    with _lock:
        _users[id(block)] -= 1
        if not _users[id(block)]:
            del _users[id(block)]
            forward_chain.remove(block, ForwardLayer.STEP_CACHE)


def _first_pattern(values: Sequence[Any], result: Any, name: str) -> ForwardPattern:
    """Return a `ForwardPattern`: a block's first arguments are its streams (hidden states), as many as its results.

    Raises:
        Refused: the block returns other tensors than those that it takes first.
    """
    streams = as_streams(result)
    shapes = [tuple(stream.shape) if isinstance(stream, Tensor) else type(stream).__name__ for stream in streams]
    taken = [tuple(value.shape) if isinstance(value, Tensor) else type(value).__name__ for value in values]
    if not all(isinstance(stream, Tensor) for stream in streams) or taken[: len(shapes)] != shapes:
        raise Refused(
            f"step_cache: blocks of {name!r} take {taken} and return {shapes}; a cache needs blocks that return "
            "the tensors which they take first, in the same shapes"
        )
    return ForwardPattern(tuple(range(len(streams))), isinstance(result, tuple | list))


def _confirmed_pattern(pattern: ForwardPattern, values: Sequence[Any], result: Any) -> ForwardPattern:
    """Return a `ForwardPattern` with the indices at which `values` holds the tensors of `result`; else `pattern`.

    The second block takes the very tensors that the first one returned; if it does not, the order is kept.
    """
    indices = [next((i for i, value in enumerate(values) if value is stream), None) for stream in as_streams(result)]
    return ForwardPattern(tuple(indices), pattern.is_tuple) if None not in indices else pattern  # type: ignore[arg-type]


@functools.cache
def _signature(kind: type[nn.Module]) -> inspect.Signature:
    return inspect.signature(kind.forward)


def _flat(bound: inspect.BoundArguments) -> list[Any]:
    """Return a list of the argument values of a call in order, `*args` one by one, without the module itself."""
    flat: list[Any] = []
    for name, value in bound.arguments.items():
        many = bound.signature.parameters[name].kind is inspect.Parameter.VAR_POSITIONAL
        flat.extend(value if many else [value])
    return flat[1:]
