"""Weights are not changed while a call runs."""

import threading

import pytest
import torch
from torch import nn

from diffsynth.errors import PipelineError
from diffsynth.runtime.running_calls import RunningCalls
from toy_pipeline import toy_pipeline


def test_calls_of_all_threads_count():
    calls = RunningCalls()
    calls.refuse("x()")
    inside, leave = threading.Event(), threading.Event()

    def run():
        with calls.entered():
            inside.set()
            leave.wait(10)

    thread = threading.Thread(target=run, name="worker")
    thread.start()
    inside.wait(10)
    with pytest.raises(PipelineError, match=r"x\(\) changes the weights, and a call .* runs in thread worker"):
        calls.refuse("x()")
    leave.set()
    thread.join()
    calls.refuse("x()")


def test_a_lora_is_not_loaded_or_cleared_during_a_call():
    """It was, and the image was made in part with it."""
    pipe = toy_pipeline()
    pipe.components["dit"].layer = nn.Linear(2, 2)
    lora = {"layer.lora_A.weight": torch.ones(1, 2), "layer.lora_B.weight": torch.ones(2, 1)}
    before = pipe.dit.layer.weight.clone()
    for change in (lambda step: pipe.load_lora(pipe.dit, state_dict=lora), lambda step: pipe.clear_lora()):
        with pytest.raises(PipelineError, match="lora\\(\\) changes the weights, and a call of this pipeline runs"):
            pipe("abc", on_step=change)
    assert torch.equal(pipe.dit.layer.weight, before)
    pipe.load_lora(pipe.dit, state_dict=lora)
    assert not torch.equal(pipe.dit.layer.weight, before)
