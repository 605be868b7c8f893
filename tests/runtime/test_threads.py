"""Calls from several threads at once return the results of calls from one thread."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

import diffsynth
from diffsynth.core.vram.managed import managed
from diffsynth.core.vram.policy import PRESETS, BlockState
from diffsynth.errors import Cancelled

CALLS = [
    {"prompt": "a red apple", "seed": 0},
    {"prompt": "dog face", "seed": 1, "cfg_scale": 3.0, "negative_prompt": "a cat"},
    {"prompt": ["green leaf", "blue heart, large"], "seed": 2},
    {"prompt": "a red apple", "seed": 3, "height": 48},
] * 2


@pytest.fixture(scope="module")
def pipe():
    return diffsynth.load("z-image-nano", device="cpu", torch_dtype=torch.float32)


@pytest.fixture(scope="module")
def second(pipe):
    """Another pipeline of the same components."""
    return type(pipe).from_components(device="cpu", torch_dtype=pipe.dtype, **pipe.components)


def generate(pipe, call, **more):
    size = {"height": 32, "width": 32, "num_inference_steps": 2, "cfg_scale": 1.0}
    return pipe(**{**size, **call, **more}, output_type="tensor")


def test_calls_in_threads_are_bit_equal_to_calls_in_turn(pipe, second):
    alone = [generate(pipe, call) for call in CALLS]
    start = threading.Barrier(4)

    def together(number):
        if number < 4:
            start.wait(timeout=10)
        return generate((pipe, second)[number % 2], CALLS[number])

    with ThreadPoolExecutor(4) as threads:
        found = list(threads.map(together, range(len(CALLS))))
    assert all(map(torch.equal, found, alone))
    assert not torch.equal(alone[0], alone[3][..., :32, :])


def test_components_are_shared_and_not_copied(pipe, second):
    assert second.text_encoder is pipe.text_encoder
    assert second.tokenizer is pipe.tokenizer
    assert [each.data_ptr() for each in second.dit.parameters()] == [each.data_ptr() for each in pipe.dit.parameters()]


def test_a_cancelled_call_leaves_the_others_alone(pipe):
    alone, stop = generate(pipe, CALLS[1]), threading.Event()
    with ThreadPoolExecutor(2) as threads:
        stopped = threads.submit(
            generate, pipe, CALLS[0], num_inference_steps=500, cancel=stop, on_step=lambda _: stop.set()
        )
        other = threads.submit(generate, pipe, CALLS[1])
        assert torch.equal(other.result(timeout=30), alone)
        with pytest.raises(Cancelled):
            stopped.result(timeout=30)


def test_two_threads_load_one_model(pipe):
    with ThreadPoolExecutor(2) as threads:
        loaded = list(
            threads.map(lambda _: diffsynth.load("z-image-nano", device="cpu", torch_dtype=torch.float32), range(2))
        )
    assert loaded[0].dit is not loaded[1].dit
    assert all(torch.equal(generate(one, CALLS[0]), generate(pipe, CALLS[0])) for one in loaded)


@pytest.fixture(scope="module", params=PRESETS)
def offloaded(request):
    return diffsynth.load("z-image-nano", device="cpu", torch_dtype=torch.float32, policy=request.param)


def test_every_policy_under_load(offloaded):
    alone = [generate(offloaded, call) for call in CALLS[:2]]
    stop = threading.Event()

    def together(number):
        if number == 2:  # a call that ends while others run
            with pytest.raises(Cancelled):
                generate(offloaded, CALLS[0], cancel=stop, on_step=lambda _: stop.set())
        return generate(offloaded, CALLS[number % 2])

    with ThreadPoolExecutor(3) as threads:
        found = list(threads.map(together, range(6)))
    assert all(torch.equal(one, alone[number % 2]) for number, one in enumerate(found))


def test_a_call_that_ends_takes_no_weights_of_another(offloaded):
    alone, stopped = generate(offloaded, CALLS[0]), threading.Event()
    stopped.set()

    def end_another(step):
        with ThreadPoolExecutor(1) as thread, pytest.raises(Cancelled):
            thread.submit(generate, offloaded, CALLS[1], cancel=stopped).result(timeout=30)

    assert torch.equal(generate(offloaded, CALLS[0], on_step=end_another), alone)


def test_nothing_stays_on_the_device_after_the_last_call(offloaded):
    with ThreadPoolExecutor(3) as threads:
        list(threads.map(lambda _: generate(offloaded, CALLS[0]), range(3)))
    wrapped = [managed(offloaded.parts[role]) for role in ("dit", "text_encoder", "vae")]
    assert {module.state for module in wrapped if module is not None} <= {BlockState.OFFLOAD}
