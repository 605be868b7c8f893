"""Precedence of backend selection: the call, the context or module, the environment, then `auto`."""

from __future__ import annotations

import logging
import threading
from collections.abc import Iterator
from unittest import mock

import pytest
import torch
from torch import Tensor, nn

from diffsynth.core.attention import AttentionCall, attention, register_backend, select, use_attention
from diffsynth.core.attention.registry import BACKENDS
from diffsynth.core.gradient import gradient_checkpoint_forward
from diffsynth.errors import Refused

X = torch.randn(1, 3, 2, 4)


class Recorder:
    """A backend whose result is the queries times its number."""

    def __init__(self, number: int, refusal: str | None = None, avoidance: str | None = None) -> None:
        self.number = number
        self.refusal = refusal
        self.avoidance = avoidance

    def refuses(self, call: AttentionCall) -> str | None:
        return self.refusal

    def avoids(self, call: AttentionCall) -> str | None:
        return self.avoidance

    def __call__(self, call: AttentionCall) -> Tensor:
        return call.q * self.number


@pytest.fixture(autouse=True)
def recorders() -> Iterator[dict[str, Recorder]]:
    backends = {"one": Recorder(1), "two": Recorder(2), "three": Recorder(3)}
    with mock.patch.dict(BACKENDS, clear=True):
        for name, backend in backends.items():
            register_backend(name, backend)
        yield backends
        backends["one"].refusal = backends["one"].avoidance = None
        assert used() == 1, "a choice outlived its test"


class Net(nn.Module):
    def forward(self, x: Tensor, *, fails: bool = False) -> Tensor:
        if fails:
            raise RuntimeError("on purpose")
        return attention(x, x, x)


def used() -> int:
    return round(float((attention(X, X, X) / X).mean()))


def test_the_order_of_who_chooses(monkeypatch: pytest.MonkeyPatch) -> None:
    assert used() == 1
    monkeypatch.setenv("DIFFSYNTH_ATTENTION_IMPLEMENTATION", "Two")
    assert used() == 2
    with use_attention("three"):
        assert used() == 3
        torch.testing.assert_close(attention(X, X, X, backend="one"), X)
        with use_attention("auto"):
            assert used() == 1
        assert used() == 3
    assert used() == 2
    monkeypatch.delenv("DIFFSYNTH_ATTENTION_IMPLEMENTATION")


def test_a_module_has_its_own() -> None:
    net, other = Net(), Net()
    with use_attention("two", module=net) as choice:
        torch.testing.assert_close(net(X), 2 * X)
        torch.testing.assert_close(other(X), X)
        with use_attention("three"):
            torch.testing.assert_close(net(X), 2 * X)  # the innermost is the module's
            torch.testing.assert_close(other(X), 3 * X)
        with pytest.raises(RuntimeError, match="on purpose"):
            net(X, fails=True)
        assert used() == 1
    torch.testing.assert_close(net(X), X)
    choice.remove()
    assert (len(net._forward_hooks), len(net._forward_pre_hooks)) == (0, 0)


def test_a_module_keeps_its_own_until_it_is_removed() -> None:
    net = Net()
    choice = use_attention("two", module=net)
    torch.testing.assert_close(nn.Sequential(net)(X), 2 * X)
    choice.remove()
    torch.testing.assert_close(net(X), X)


def test_an_error_before_ours_began_ends_nothing() -> None:
    net = Net()

    def fail(*_: object) -> None:
        raise RuntimeError("on purpose")

    net.register_forward_pre_hook(fail)
    with use_attention("two"):
        with use_attention("three", module=net), pytest.raises(RuntimeError, match="on purpose"):
            net(X)
        assert used() == 2


def test_threads_do_not_share_a_choice_but_share_modules() -> None:
    net, found = Net(), {}

    def work() -> None:
        found["plain"] = used()
        found["module"] = round(float((net(X) / X).mean()))

    with use_attention("three"), use_attention("two", module=net):
        thread = threading.Thread(target=work)
        thread.start()
        thread.join()
    assert found == {"plain": 1, "module": 2}


@pytest.mark.parametrize("offload", [False, True])
def test_the_second_forward_of_a_checkpoint_uses_the_same(offload: bool) -> None:
    """The recomputation runs in the backward pass, after the block of `use_attention` has ended."""
    x = X.clone().requires_grad_()
    with use_attention("three"):
        out = gradient_checkpoint_forward(Net(), True, offload, x)
    out.sum().backward()
    torch.testing.assert_close(x.grad, torch.full_like(x, 3.0))


def test_names_are_checked_when_they_are_given() -> None:
    with pytest.raises(ValueError, match=r"'tow' is unknown; did you mean 'two'\?"):
        use_attention("tow")
    with use_attention("two") as choice, pytest.raises(ValueError, match="already entered"), choice:
        pass


def test_a_backend_that_avoids_a_call_serves_if_all_others_refuse(recorders: dict[str, Recorder]) -> None:
    recorders["one"].avoidance = "slow here"
    assert used() == 2
    for name in ("two", "three"):
        recorders[name].refusal = "no device"
    assert used() == 1
    recorders["one"].refusal = "no library"
    with pytest.raises(Refused, match="one: no library; two: no device; three: no device"):
        attention(X, X, X)


def test_why_a_backend_is_not_used_is_logged_once(
    recorders: dict[str, Recorder], caplog: pytest.LogCaptureFixture
) -> None:
    recorders["one"].refusal = "no device"
    with caplog.at_level(logging.INFO, logger=select.logger.name):
        assert [used() for _ in range(3)] == [2, 2, 2]
        recorders["one"].refusal = "head dim 4"
        assert used() == 2
    assert [record.getMessage() for record in caplog.records] == [
        "attention does not use one: no device",
        "attention does not use one: head dim 4",
    ]


@pytest.mark.parametrize("is_context_traced", sorted({select.CAN_TRACE_CONTEXTVARS, False}))
def test_a_choice_within_compiled_code(is_context_traced: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """With torch 2.11 a ContextVar broke the graph, so that fullgraph=True raised; a thread-local is used there."""
    monkeypatch.setattr(select, "CAN_TRACE_CONTEXTVARS", is_context_traced)
    compiled = torch.compile(lambda x: attention(x, x, x), fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(X), X)
    with use_attention("three"):
        torch.testing.assert_close(compiled(X), 3 * X)
    torch.testing.assert_close(compiled(X), X)


def test_compiled_code_serves_the_next_choice_of_the_same_name() -> None:
    """A choice per step must not recompile per step: compiled code guards on the name alone."""
    graphs: list[object] = []

    def count(module: torch.fx.GraphModule, _: list[Tensor]) -> torch.fx.GraphModule:
        graphs.append(module)
        return module

    compiled = torch.compile(lambda x: attention(x, x, x), backend=count)
    for _ in range(3):
        for name, number in (("two", 2), ("three", 3)):
            with use_attention(name):
                torch.testing.assert_close(compiled(X), number * X)
    assert len(graphs) <= 2
