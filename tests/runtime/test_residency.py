import logging

import pytest
import torch
from torch import nn

from diffsynth.errors import NotEnoughMemory
from diffsynth.runtime.residency import Residency


class Recorder(nn.Module):
    """A module that notes where it was sent; there is no accelerator here to send it to."""

    def __init__(self, mebibytes: int = 1) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(mebibytes, 2**18))
        self.places: list[str] = []

    def to(self, device):
        self.places.append(str(device))
        return self


def test_without_a_limit_nothing_moves():
    module = Recorder()
    with Residency({"dit": module}, torch.device("cuda"), None).on_device(["dit"]):
        pass
    assert module.places == []


def test_with_a_limit_a_stage_has_its_roles_and_no_others():
    dit, vae = Recorder(), Recorder()
    residency = Residency({"dit": dit, "vae": vae, "tokenizer": object()}, torch.device("cuda"), 1.0)
    with residency.on_device(["dit", "tokenizer"]):
        assert (dit.places[-1], vae.places[-1]) == ("cuda", "cpu")
    assert dit.places == ["cpu", "cuda", "cpu"]
    assert vae.places == ["cpu"]


def test_roles_go_back_when_a_stage_fails():
    dit = Recorder()
    residency = Residency({"dit": dit}, torch.device("cuda"), 1.0)
    with pytest.raises(KeyError), residency.on_device(["dit"]):
        raise KeyError("stage")
    assert dit.places[-1] == "cpu"


def test_a_component_larger_than_the_limit_names_the_smallest_that_works():
    with pytest.raises(NotEnoughMemory, match=r"dit alone takes 0\.01 GiB; the smallest limit that works.* is 0\.01"):
        Residency({"dit": Recorder(10), "vae": Recorder()}, torch.device("cuda"), 0.001)


def test_a_limit_on_the_cpu_is_said_to_have_no_effect(caplog):
    with caplog.at_level(logging.WARNING):
        Residency({"dit": Recorder(10)}, torch.device("cpu"), 0.001)
    assert "vram_limit=0.001 has no effect" in caplog.text
