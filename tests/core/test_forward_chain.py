"""Layers around a module's forward: whichever is removed, in whichever order, the others stay in effect."""

from __future__ import annotations

import copy
import functools
import gc
import inspect
import itertools
import threading
import weakref

import pytest
import torch
from torch import nn

from diffsynth.core import forward_chain
from diffsynth.core.forward_chain import ForwardLayer, find, install, is_compiled, remove
from diffsynth.core.vram.managed import managed, wrap
from diffsynth.core.vram.policy import Policy
from diffsynth.runtime.acceleration import TaylorSeer
from diffsynth.runtime.acceleration.compiling import compile_forward
from diffsynth.runtime.acceleration.session import StepCacheSession
from diffsynth.runtime.architectures import Stack

ORDER = [ForwardLayer.STEP_CACHE, ForwardLayer.STREAMING, ForwardLayer.COMPILED]


class Block(nn.Module):
    """A block that records in `calls` which layers its forward passes, outermost first."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(8, 8)
        self.calls: list[str] = []

    def forward(self, x, *, scale=1.0):
        self.calls.append("forward")
        return x + scale * self.linear(x)


class Network(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Quiet() for _ in range(3))

    def forward(self, x):
        for block in self.blocks:
            x = block(x)
        return x


class Quiet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(8, 8)

    def forward(self, x):
        return x + self.linear(x)


class CountingBackend:
    """A backend of `torch.compile` that runs graphs as they are, and counts them and their calls."""

    def __init__(self) -> None:
        self.graphs = self.calls = 0

    def __call__(self, graph: torch.fx.GraphModule, inputs: list):
        self.graphs += 1

        def run(*args):
            self.calls += 1
            return graph.forward(*args)

        return run


@pytest.fixture
def backend():
    torch._dynamo.reset()
    yield CountingBackend()
    torch._dynamo.reset()


def noting(block: Block, layer: ForwardLayer, name: str | None = None):
    """Return a decorator that records the name of its layer in `calls` of the block."""

    def decorate(forward):
        def noted(*args, **kwargs):
            block.calls.append(name or layer.name)
            return forward(*args, **kwargs)

        return noted

    return decorate


def passed(block: Block) -> list[str]:
    """Return the names of the layers that a call passes, outermost first."""
    block.calls.clear()
    x = torch.ones(1, 8)
    assert torch.equal(block(x, scale=2.0), x + 2.0 * block.linear(x))
    return list(block.calls)


@pytest.mark.parametrize("installed", list(itertools.permutations(ORDER)))
def test_layers_have_one_order_and_leave_one_by_one(installed):
    for removed in itertools.permutations(ORDER):
        block = Block()
        for layer in installed:
            install(block, layer, noting(block, layer))
        left = list(ORDER)
        assert passed(block) == [*(layer.name for layer in left), "forward"]
        for layer in removed:
            remove(block, layer)
            left.remove(layer)
            assert passed(block) == [*(each.name for each in left), "forward"]
            assert [each for each in ORDER if find(block, each) is not None] == left
        assert "forward" not in vars(block)
        assert set(vars(block)) == set(vars(Block()))


def test_a_layer_of_the_same_kind_is_replaced():
    block = Block()
    install(block, ForwardLayer.STREAMING, noting(block, ForwardLayer.STREAMING, "first"))
    install(block, ForwardLayer.STREAMING, noting(block, ForwardLayer.STREAMING, "second"))
    assert passed(block) == ["second", "forward"]
    remove(block, ForwardLayer.COMPILED)
    remove(block, ForwardLayer.STREAMING)
    remove(block, ForwardLayer.STREAMING)
    assert passed(block) == ["forward"]


def test_a_decorator_that_raises_changes_nothing():
    block = Block()

    def broken(forward):
        raise TypeError("no such option")

    with pytest.raises(TypeError):
        install(block, ForwardLayer.COMPILED, broken)
    assert "forward" not in vars(block)
    install(block, ForwardLayer.STREAMING, noting(block, ForwardLayer.STREAMING))
    with pytest.raises(TypeError):
        install(block, ForwardLayer.COMPILED, broken)
    assert passed(block) == ["STREAMING", "forward"]


def assigned(block: Block, *, wraps: bool):
    """Return a forward that other code put around the one that the block has."""
    inner = block.forward

    def forward(*args, **kwargs):
        block.calls.append("assigned")
        return inner(*args, **kwargs)

    return functools.wraps(inner)(forward) if wraps else forward


@pytest.mark.parametrize("wraps", [True, False])
def test_a_forward_that_was_assigned_before_stays_innermost(wraps):
    block = Block()
    block.forward = ours = assigned(block, wraps=wraps)
    for layer in ORDER:
        install(block, layer, noting(block, layer))
    assert passed(block) == ["STEP_CACHE", "STREAMING", "COMPILED", "assigned", "forward"]
    for layer in ORDER:
        remove(block, layer)
    assert block.forward is ours


def test_a_hook_that_was_put_around_the_chain_stays_outermost():
    """As accelerate does: it remembers the forward that it found, and puts it back when its hook is removed."""
    block = Block()
    install(block, ForwardLayer.STREAMING, noting(block, ForwardLayer.STREAMING))
    found = block.forward
    block.forward = assigned(block, wraps=True)
    install(block, ForwardLayer.COMPILED, noting(block, ForwardLayer.COMPILED))
    assert passed(block) == ["assigned", "STREAMING", "COMPILED", "forward"]
    remove(block, ForwardLayer.STREAMING)
    assert passed(block) == ["assigned", "COMPILED", "forward"]
    block.forward = found
    assert passed(block) == ["COMPILED", "forward"]
    remove(block, ForwardLayer.COMPILED)
    assert "forward" not in vars(block)


def test_a_hook_outlives_the_layers():
    block = Block()
    install(block, ForwardLayer.STREAMING, noting(block, ForwardLayer.STREAMING))
    block.forward = assigned(block, wraps=True)
    remove(block, ForwardLayer.STREAMING)
    assert passed(block) == ["assigned", "forward"]
    install(block, ForwardLayer.STEP_CACHE, noting(block, ForwardLayer.STEP_CACHE))
    assert passed(block) == ["assigned", "STEP_CACHE", "forward"]


def test_accelerate_hooks_stay():
    hooks = pytest.importorskip("accelerate.hooks")
    block = Block()
    install(block, ForwardLayer.STREAMING, noting(block, ForwardLayer.STREAMING))
    hooks.add_hook_to_module(block, hooks.ModelHook())
    install(block, ForwardLayer.COMPILED, noting(block, ForwardLayer.COMPILED))
    assert passed(block) == ["STREAMING", "COMPILED", "forward"]
    hooks.remove_hook_from_module(block)
    remove(block, ForwardLayer.STREAMING)
    assert passed(block) == ["COMPILED", "forward"]


@pytest.mark.parametrize("calls_it", [True, False])
def test_a_function_that_replaced_the_chain_gets_the_layers_around_it(calls_it):
    """Nothing tells whether a closure calls the forward that it replaced, so either must work."""
    block = Block()
    install(block, ForwardLayer.COMPILED, noting(block, ForwardLayer.COMPILED))
    if calls_it:
        block.forward = ours = assigned(block, wraps=False)
    else:

        def ours(x, *, scale=1.0):
            block.calls.append("assigned")
            return Block.forward(block, x, scale=scale)

        block.forward = ours
    install(block, ForwardLayer.STREAMING, noting(block, ForwardLayer.STREAMING))
    assert passed(block) == ["STREAMING", "COMPILED", "assigned", "forward"]
    remove(block, ForwardLayer.COMPILED)
    remove(block, ForwardLayer.STREAMING)
    assert passed(block) == ["assigned", "forward"]
    assert block.forward is ours


def test_the_signature_is_that_of_the_class():
    block = Block()
    plain = inspect.signature(block.forward)
    install(block, ForwardLayer.STREAMING, noting(block, ForwardLayer.STREAMING))
    assert inspect.signature(block.forward) == plain


def test_a_module_with_layers_is_collected():
    block = Block()
    install(block, ForwardLayer.STREAMING, noting(block, ForwardLayer.STREAMING))
    gone = weakref.ref(block)
    del block
    gc.collect()
    assert gone() is None


def test_a_deep_copy_is_compiled_and_has_nothing_else(backend):
    """A copied function ran the original: its weights, its cache, its counts."""
    block = Quiet()
    for layer in (ForwardLayer.STEP_CACHE, ForwardLayer.STREAMING):
        install(block, layer, lambda forward: lambda x: 100 * forward(x))
    compile_forward(block, backend="eager")
    copied = copy.deepcopy(block)
    with torch.no_grad():
        copied.linear.weight.zero_()
        copied.linear.bias.zero_()
    x = torch.ones(1, 8)
    assert torch.equal(copied(x), x)
    assert not torch.equal(block(x), x)
    assert find(copied, ForwardLayer.STREAMING) is None
    assert find(copied, ForwardLayer.STEP_CACHE) is None
    assert is_compiled(copied)
    remove(copied, ForwardLayer.COMPILED)
    assert "forward" not in vars(copied)
    assert is_compiled(block)
    shallow = copy.copy(block)
    remove(shallow, ForwardLayer.STREAMING)
    assert find(block, ForwardLayer.STREAMING) is not None


def test_threads_install_and_remove_while_others_call():
    block = Quiet().eval()
    x = torch.ones(1, 8)
    with torch.no_grad():
        expected = block(x)
    failures: list[BaseException] = []
    stop = threading.Event()

    def calls():
        try:
            with torch.no_grad():
                while not stop.is_set():
                    assert torch.equal(block(x), expected)
        except BaseException as error:
            failures.append(error)

    def changes(layer: ForwardLayer):
        try:
            for _ in range(300):
                install(block, layer, lambda forward: lambda x: forward(x))
                assert find(block, layer) is not None
                remove(block, layer)
        except BaseException as error:
            failures.append(error)

    callers = [threading.Thread(target=calls) for _ in range(2)]
    changers = [threading.Thread(target=changes, args=(layer,)) for layer in ORDER]
    for thread in (*callers, *changers):
        thread.start()
    for thread in changers:
        thread.join()
    stop.set()
    for thread in callers:
        thread.join()
    assert failures == []
    assert "forward" not in vars(block)


# The users of the chain together: compiling, the VRAM engine, step caches, hot LoRAs.


@pytest.mark.parametrize("compiled_first", [True, False])
def test_unwrapping_keeps_blocks_compiled(backend, compiled_first):
    """`unwrap` took the instance's forward away, and with it the compiled code: blocks ran eagerly, silently."""
    network, x = Network().requires_grad_(False).eval(), torch.randn(3, 8)
    truth = network(x)

    def compile_blocks():
        for block in network.blocks:
            compile_forward(block, backend=backend, fullgraph=True)

    if compiled_first:
        compile_blocks()
    wrap(network, Policy.preset("cpu-offload", "cpu"), smallest=0)
    if not compiled_first:
        compile_blocks()
    with managed(network):
        assert torch.equal(network(x), truth)
    assert (backend.graphs, backend.calls) == (1, 3)
    managed(network).unwrap()
    assert torch.equal(network(x), truth)
    assert (backend.graphs, backend.calls) == (1, 6)
    assert "forward" not in vars(network)


@pytest.mark.parametrize("session_first", [True, False])
def test_unwrapping_and_step_caches_keep_each_other(session_first):
    """`unwrap` took the layer of a step cache away, and the cache then failed at its end."""
    network, x = Network().requires_grad_(False).eval(), torch.randn(3, 8)
    truth = network(x)
    session = StepCacheSession(TaylorSeer(interval=2), [[Stack("blocks", tuple(network.blocks))]])
    policy = Policy.preset("cpu-offload", "cpu")
    if not session_first:
        wrap(network, policy, smallest=0)
    with session:
        if session_first:
            wrap(network, policy, smallest=0)
        block = network.blocks[0]
        assert find(block, ForwardLayer.STEP_CACHE) is not None
        assert find(block, ForwardLayer.STREAMING) is not None
        with session.forward_pass("cond", is_last=False):
            assert torch.equal(network(x), truth)
        managed(network).unwrap()
        assert find(block, ForwardLayer.STEP_CACHE) is not None
        with session.forward_pass("cond", is_last=True):
            assert torch.equal(network(x), truth)
    assert all("forward" not in vars(block) for block in network.blocks)
    assert torch.equal(network(x), truth)


def test_a_step_cache_that_ends_keeps_blocks_streamed_and_compiled(backend):
    network, x = Network().requires_grad_(False).eval(), torch.randn(3, 8)
    truth = network(x)
    with StepCacheSession(TaylorSeer(interval=2), [[Stack("blocks", tuple(network.blocks))]]):
        wrap(network, Policy.preset("cpu-offload", "cpu"), smallest=0)
        for block in network.blocks:
            compile_forward(block, backend=backend, fullgraph=True)
    assert torch.equal(network(x), truth)
    assert (backend.graphs, backend.calls) == (1, 3)
    assert managed(network).state.value == "onload"


def test_two_wraps_do_not_share_a_block():
    network = Network().requires_grad_(False).eval()
    wrap(network, Policy.preset("cpu-offload", "cpu"), smallest=0)
    with pytest.raises(ValueError, match=r"again\.0"):
        wrap(nn.ModuleDict({"again": network.blocks}), Policy.preset("cpu-offload", "cpu"), smallest=0)


def test_a_wrapped_module_is_not_copied():
    """Two modules would move the same weights; `copy` failed at a lock, which says nothing."""
    network = Network().requires_grad_(False).eval()
    wrap(network, Policy.preset("cpu-offload", "cpu"), smallest=0)
    with pytest.raises(TypeError, match="unwrap"):
        copy.deepcopy(network)
    block = copy.deepcopy(network.blocks[0])
    assert torch.equal(block.linear.weight, network.blocks[0].linear.weight)
    assert find(block, ForwardLayer.STREAMING) is None


def test_a_class_that_changes_is_the_one_that_runs():
    class Doubled(Block):
        def forward(self, x, *, scale=1.0):
            self.calls.append("doubled")
            return super().forward(x, scale=scale)

    block = Block()
    install(block, ForwardLayer.STREAMING, noting(block, ForwardLayer.STREAMING))
    block.__class__ = Doubled
    forward_chain.class_changed(block)
    assert passed(block) == ["STREAMING", "doubled", "forward"]


def test_what_is_compiled_is_known(backend):
    by_layer, by_hand, by_torch, plain = Quiet(), Quiet(), Quiet(), Quiet()
    compile_forward(by_layer, backend=backend)
    by_hand.forward = torch.compile(by_hand.forward, backend=backend)
    by_torch.compile(backend=backend)
    install(plain, ForwardLayer.STREAMING, lambda forward: forward)
    assert [is_compiled(each) for each in (by_layer, by_hand, by_torch, plain)] == [True, True, True, False]
    install(by_hand, ForwardLayer.STREAMING, lambda forward: lambda x: forward(x))
    assert is_compiled(by_hand)
    compile_forward(by_hand, backend=backend, fullgraph=True)
    by_hand(torch.ones(1, 8))
    assert (backend.graphs, backend.calls) == (1, 1)
