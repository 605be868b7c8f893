"""Stages load the components that they use, and offload those that are in the way."""

from __future__ import annotations

import threading

import pytest
import torch
from torch import nn

from diffsynth.core.vram.managed import managed, wrap
from diffsynth.core.vram.policy import BlockState, Policy
from diffsynth.runtime.stage_offloader import StageOffloader

CPU = torch.device("cpu")
HOST = Policy.preset("cpu-offload", "cpu")


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(4), requires_grad=False)

    def forward(self) -> torch.Tensor:
        return self.weight + 1


def offloader(*roles: str) -> tuple[StageOffloader, dict[str, Net]]:
    modules = {role: Net() for role in roles}
    for module in modules.values():
        wrap(module, HOST)
    return StageOffloader({**modules, "tokenizer": object(), "empty": None}, CPU), modules


def states(modules: dict[str, Net]) -> dict[str, BlockState]:
    return {role: managed(module).state for role, module in modules.items()}


def test_modules_without_a_policy_are_left_alone():
    module = Net()
    with StageOffloader({"dit": module}, CPU).on_device(["dit"]):
        assert "forward" not in vars(module)


def test_a_stage_has_its_roles_and_no_others():
    stages, modules = offloader("dit", "vae")
    with stages.on_device(["dit", "tokenizer"]):
        assert states(modules) == {"dit": BlockState.ONLOAD, "vae": BlockState.OFFLOAD}
    assert states(modules)["dit"] is BlockState.ONLOAD, "it stays until another stage needs the memory"
    with stages.on_device(["vae"]):
        assert states(modules) == {"dit": BlockState.OFFLOAD, "vae": BlockState.ONLOAD}
    stages.end_call(None)
    assert set(states(modules).values()) == {BlockState.OFFLOAD}


def test_another_pipelines_components_leave_too():
    one, modules = offloader("dit")
    other, _ = offloader("dit")
    with one.on_device(["dit"]):
        pass
    with other.on_device(["dit"]):
        assert states(modules) == {"dit": BlockState.OFFLOAD}


@pytest.mark.parametrize("error", [KeyError, KeyboardInterrupt])
def test_roles_leave_when_a_stage_fails(error):
    stages, modules = offloader("dit")
    with pytest.raises(error), stages.on_device(["dit"]):
        raise error("stage")
    assert states(modules) == {"dit": BlockState.OFFLOAD}


def test_stages_of_two_threads_take_turns():
    """Without turns, the thread that ends first takes the module from under the other."""
    one, _ = offloader("dit")
    other, _ = offloader("dit")
    inside, may_end, order = threading.Event(), threading.Event(), []

    def first():
        with one.on_device(["dit"]):
            inside.set()
            may_end.wait(timeout=10)
            order.append("first ends")

    def second():
        inside.wait(timeout=10)
        with other.on_device(["dit"]):
            order.append("second begins")

    threads = [threading.Thread(target=first), threading.Thread(target=second)]
    for thread in threads:
        thread.start()
    inside.wait(timeout=10)
    threads[1].join(timeout=0.2)
    assert order == []
    may_end.set()
    for thread in threads:
        thread.join()
    assert order == ["first ends", "second begins"]
