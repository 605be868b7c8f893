"""Generators and states of random numbers."""

import torch

from diffsynth.core import device as devices
from fake_devices import BARE


def test_a_seed_gives_the_same_numbers():
    first, second = (torch.randn(3, generator=devices.generator("cpu", seed=5)) for _ in range(2))
    assert torch.equal(first, second)
    assert devices.generator("mps", seed=1).device.type == "cpu"


def test_random_state(recorded, bare):
    torch.manual_seed(3)
    state = devices.random_state("cpu")
    first = torch.rand(3)
    devices.set_random_state(state, "cpu")
    assert torch.equal(torch.rand(3), first)
    devices.set_random_state(devices.random_state(BARE), BARE)


def test_random_state_of_one_of_many(recorded):
    devices.set_random_state(devices.random_state("cuda:1"), "cuda:1")
    assert recorded.log == [("host", "sets 16 bytes of randomness of cuda:1")]
