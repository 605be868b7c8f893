"""A step cache at work in one call of a pipeline: what its blocks give, or what they would have given.

Blocks are taken out of the network's own code by what stands around their `forward`; it is put there while a call with
a cache runs, and asks a context variable whether this thread's call has one. So calls do not see each other's caches,
and the VRAM engine, which stands further inside, does not fetch the weights of blocks that are left out.
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
    as_streams,
)
from diffsynth.runtime.acceleration.strategies import model_named
from diffsynth.runtime.architectures import Stack, long_stacks
from diffsynth.spec import ModelSpec

_call: ContextVar[ForwardPass | None] = ContextVar("diffsynth_step_cache", default=None)
_surrounded: dict[int, int] = {}
_lock = threading.Lock()


def step_cache_session(
    cache: StepCache | None, components: Mapping[str, Any], loop_roles: Collection[str], model_name: str | None
) -> StepCacheSession:
    """The caches of one call, empty still.

    Args:
        cache: None caches nothing.
        components: role -> what is loaded.
        loop_roles: the networks that the loop calls.
        model_name: the pipeline's, None if it was put together from files.

    Raises:
        Refused: the model, or the form of its network, is not served; the message says why.
    """
    if cache is None:
        return StepCacheSession(None)
    model = None if model_name is None else model_named(model_name)
    if (reason := cache.refuses(model)) is not None:
        raise Refused(f"step_cache={cache!r} is refused: {reason}")
    loaded = {role: components[role] for role in loop_roles if isinstance(components.get(role), nn.Module)}
    networks = [stacks for stacks in map(long_stacks, loaded.values()) if sum(len(each.blocks) for each in stacks) > 1]
    if not networks:
        kinds = ", ".join(f"{role} ({type(module).__name__})" for role, module in loaded.items())
        raise Refused(
            f"step_cache={cache!r} is refused: {kinds or 'no network'} has no repeated blocks that could be left out; "
            "its architecture names them in repeated_blocks"
        )
    return StepCacheSession(cache, networks, model)


class StepCacheSession:
    """The caches of one call: one per network, branch, and place in an evaluation of the branch.

        with caching:
            with caching.evaluating("cond", is_last=False):
                velocity = ...

    Args:
        cache: None caches nothing.
        networks: the stacks of each network that may be left out.
        model: the pipeline's, if it has a name.
    """

    def __init__(
        self, cache: StepCache | None, networks: Sequence[Sequence[Stack]] = (), model: ModelSpec | None = None
    ) -> None:
        self._cache, self._model = cache, model
        self._networks = networks if cache is not None else ()
        self._places = {
            id(block): BlockPosition(number, index, position, stack)
            for number, stacks in enumerate(self._networks)
            for index, stack in enumerate(stacks)
            for position, block in enumerate(stack.blocks)
        }
        self._histories: dict[tuple[int, str, int], BranchHistory] = {}
        self._reused: list[str] = []

    def __enter__(self) -> StepCacheSession:
        for block in self._blocks():
            _surround(block)
        return self

    def __exit__(self, *error: object) -> None:
        for block in self._blocks():
            _release(block)

    @contextmanager
    def forward_pass(self, branch: str, *, is_last: bool) -> Iterator[None]:
        """One evaluation of a branch's velocity inside the `with`."""
        forward_pass = ForwardPass(self, branch, is_last)
        token = _call.set(forward_pass if self._places else None)
        try:
            yield
        finally:
            _call.reset(token)
        if forward_pass.reused:
            self._reused.append(branch)

    def take_reused(self) -> tuple[str, ...]:
        """The branches that reused something since this was last asked."""
        reused, self._reused = tuple(self._reused), []
        return reused

    def place(self, block: nn.Module) -> BlockPosition | None:
        """Where a block stands, if it is one that may be left out."""
        return self._places.get(id(block))

    def history(self, network: int, branch: str, ordinal: int) -> BranchHistory:
        """What is known of a branch, at its `ordinal`-th call of a network within an evaluation."""
        key = (network, branch, ordinal)
        if key not in self._histories:
            assert self._cache is not None
            self._histories[key] = BranchHistory(self._cache.strategy(self._model), len(self._networks[network]))
        return self._histories[key]

    def _blocks(self) -> Iterator[nn.Module]:
        return (block for stacks in self._networks for stack in stacks for block in stack.blocks)


@dataclass(frozen=True)
class BlockPosition:
    """A block's network, the index of its stack, and its position in it."""

    network: int
    index: int
    position: int
    stack: Stack

    @property
    def is_last(self) -> bool:
        """Whether the stack ends here."""
        return self.position == len(self.stack.blocks) - 1


@dataclass
class BranchHistory:
    """One branch of one network, over all steps of a call.

    Args:
        rule: what decides.
        num_stacks: how many stacks must have run before any may be left out.
    """

    strategy: CacheStrategy
    num_stacks: int
    index: int = -1
    decider: int = 0
    reusing: bool = False
    patterns: dict[int, ForwardPattern] = field(default_factory=dict)
    known: set[int] = field(default_factory=set)
    begun: dict[int, tuple[Sequence[Any], Any]] = field(default_factory=dict)

    def begin(self, decider: int) -> None:
        """A call of the network begins, with the first block of stack `decider`."""
        self.index, self.decider, self.reusing, self.begun = self.index + 1, decider, False, {}

    def pattern_of(self, stack: int, values: Sequence[Any], given: Any, *, name: str) -> ForwardPattern:
        """The form of a stack, learnt from its first block."""
        if stack not in self.patterns:
            self.patterns[stack] = _learn(values, given, name)
        return self.patterns[stack]

    def ran(self, place: BlockPosition, values: Sequence[Any], given: Any) -> None:
        """A block ran."""
        stack = place.index
        if place.position == 0:
            self.pattern_of(stack, values, given, name=place.stack.name)
            self.begun[stack] = (values, given)
        first_values, first_given = self.begun[stack]
        if place.position == 1:
            self.patterns[stack] = _confirm(self.patterns[stack], values, first_given)
        if place.is_last:
            after_first = stack == self.decider and self.strategy.after_first
            start = as_streams(first_given) if after_first else self.patterns[stack].streams(first_values)
            self.strategy.computed(stack, self.index, start, as_streams(given))
            self.known.add(stack)
            self.begun[stack] = ((), None)  # the streams of a step are not kept until the next


class ForwardPass:
    """One evaluation of one branch."""

    def __init__(self, caching: StepCacheSession, branch: str, is_last: bool) -> None:
        self._caching, self._branch, self._is_last = caching, branch, is_last
        self._open: dict[int, tuple[int, BranchHistory]] = {}
        self.reused = False

    def run(self, block: nn.Module, forward: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        """What a block gives, or would have given."""
        place = self._caching.place(block)
        if place is None:
            return forward(*args, **kwargs)
        bound = _signature(type(block)).bind(block, *args, **kwargs)
        values = _flat(bound)
        history, begins = self._history(place)
        if begins:
            return self._decide(history, place, block, functools.partial(forward, *args, **kwargs), bound)
        if history.reusing:
            pattern = history.patterns[place.index]
            start = pattern.streams(values)
            return pattern.result(
                start if place.position else history.strategy.predicted(place.index, history.index, start)
            )
        given = forward(*args, **kwargs)
        history.ran(place, values, given)
        return given

    def _history(self, place: BlockPosition) -> tuple[BranchHistory, bool]:
        """The track of a block, and whether a call of the network begins with it."""
        ordinal, history = self._open.get(place.network, (-1, None))
        again = history is not None and place.position == 0 and place.index == history.decider
        if history is not None and not again:
            return history, False
        history = self._caching.history(place.network, self._branch, ordinal + 1)
        self._open[place.network] = (ordinal + 1, history)
        history.begin(place.index)
        return history, True

    def _decide(
        self,
        history: BranchHistory,
        place: BlockPosition,
        block: nn.Module,
        run: Callable[[], Any],
        bound: inspect.BoundArguments,
    ) -> Any:
        """The first block of a call of the network, and whether the rest is left out."""
        values = _flat(bound)
        pattern_of = functools.partial(history.pattern_of, place.index, values, name=place.stack.name)
        first_call = FirstBlockCall(history.index, self._is_last, bound.arguments, values, block, run, pattern_of)
        history.reusing = history.strategy.reuses(first_call) and len(history.known) == history.num_stacks
        if not history.reusing:
            history.ran(place, values, first_call.result)
            return first_call.result
        self.reused = True
        pattern = history.patterns[place.index]
        start = first_call.output if history.strategy.after_first else pattern.streams(values)
        return pattern.result(history.strategy.predicted(place.index, history.index, start))


def _run(block: nn.Module, forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    forward_pass = _call.get()
    return forward(*args, **kwargs) if forward_pass is None else forward_pass.run(block, forward, args, kwargs)


def _surround(block: nn.Module) -> None:
    with _lock:
        count = _surrounded.get(id(block), 0)
        if count == 0:
            decorate = functools.partial(functools.partial, _run, block)
            forward_chain.install(block, ForwardLayer.STEP_CACHE, decorate)
        _surrounded[id(block)] = count + 1


def _release(block: nn.Module) -> None:
    """Remove the layer of a block when the last call that needs it is over."""
    with _lock:
        _surrounded[id(block)] -= 1
        if not _surrounded[id(block)]:
            del _surrounded[id(block)]
            forward_chain.remove(block, ForwardLayer.STEP_CACHE)


def _learn(values: Sequence[Any], given: Any, name: str) -> ForwardPattern:
    """Streams are the first arguments, in the order in which they are given back."""
    streams = as_streams(given)
    shapes = [tuple(stream.shape) if isinstance(stream, Tensor) else type(stream).__name__ for stream in streams]
    taken = [tuple(value.shape) if isinstance(value, Tensor) else type(value).__name__ for value in values]
    if not all(isinstance(stream, Tensor) for stream in streams) or taken[: len(shapes)] != shapes:
        raise Refused(
            f"step_cache: blocks of {name!r} take {taken} and give {shapes}; a cache needs blocks that give "
            "the tensors which they take first, in the same shapes"
        )
    return ForwardPattern(tuple(range(len(streams))), isinstance(given, tuple | list))


def _confirm(pattern: ForwardPattern, values: Sequence[Any], given: Any) -> ForwardPattern:
    """The form, its order put right where the next block is seen to take the very tensors that this one gave."""
    places = [next((i for i, value in enumerate(values) if value is stream), None) for stream in as_streams(given)]
    return ForwardPattern(tuple(places), pattern.is_tuple) if None not in places else pattern  # type: ignore[arg-type]


@functools.cache
def _signature(kind: type[nn.Module]) -> inspect.Signature:
    return inspect.signature(kind.forward)


def _flat(bound: inspect.BoundArguments) -> list[Any]:
    """The values of a call in order, without the module itself."""
    flat: list[Any] = []
    for name, value in bound.arguments.items():
        many = bound.signature.parameters[name].kind is inspect.Parameter.VAR_POSITIONAL
        flat.extend(value if many else [value])
    return flat[1:]
