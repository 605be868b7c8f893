"""Two experts: the files of the second are read ahead while the last step of the first computes."""

from __future__ import annotations

import threading
from dataclasses import replace

import pytest
import torch
from tests.core.vram.sources import emptied, on_disk
from torch import nn

from diffsynth.core.loader import file_prefetcher
from diffsynth.core.vram.managed import wrap
from diffsynth.core.vram.policy import Placement, Policy
from diffsynth.errors import CorruptFile
from diffsynth.runtime.stage_offloader import ExpertSwitcher, StageOffloader

CPU = torch.device("cpu")


class Recorded(StageOffloader):
    """Records its calls."""

    def __init__(self, components=None):
        super().__init__(components or {}, CPU)
        self.events = []

    def on_device(self, roles, stage="", plan=None, *, in_loop=False):
        self.events.append(f"{'denoise' if in_loop else stage} {'+'.join(roles)}")
        return super().on_device(roles, stage, plan, in_loop=in_loop)

    def prepare(self, roles):
        self.events += [f"prepare {role}" for role in roles]
        super().prepare(roles)


def played(offloader, roles, work=lambda: None):
    with ExpertSwitcher(offloader, roles, None) as experts:
        for step in range(len(roles)):
            experts.begin_step()
            offloader.events.append(f"step {step}")
            work()
    return offloader.events


HIGH, LOW = ("dit", "adapter"), ("dit2", "adapter")


def test_the_second_expert_is_prepared_before_the_last_step_of_the_first():
    assert played(Recorded(), [HIGH, HIGH, LOW, LOW]) == [
        "denoise dit+adapter",
        "step 0",
        "prepare dit2",
        "step 1",
        "denoise dit2+adapter",
        "step 2",
        "step 3",
    ]


def test_one_step_of_the_first_is_enough_and_one_expert_has_no_next():
    assert played(Recorded(), [HIGH, LOW])[:3] == ["denoise dit+adapter", "prepare dit2", "step 0"]
    assert played(Recorded(), [HIGH] * 3) == ["denoise dit+adapter", "step 0", "step 1", "step 2"]


def expert(seed, folder):
    torch.manual_seed(seed)
    tower = nn.Sequential(*(nn.Linear(8, 8) for _ in range(4))).requires_grad_(False).eval()
    x = torch.ones(1, 8)
    truth = tower(x)
    source = on_disk(tower, folder)
    return emptied(tower), source, x, truth


@pytest.mark.parametrize("onload", ["disk", "cpu"])
def test_it_reads_while_the_first_computes_and_changes_no_bit(tmp_path, monkeypatch, onload):
    policy = replace(Policy.preset("disk", "cpu"), onload=Placement(onload))
    first, source, x, truth = expert(0, tmp_path / "first")
    second, source2, _, truth2 = expert(1, tmp_path / "second")
    wrap(first, policy, source=source, smallest=0)
    wrap(second, policy, source=source2, smallest=0)
    offloader, begun, ended = Recorded({"dit": first, "dit2": second}), threading.Event(), threading.Event()

    def read_ahead(*, limit, stop):
        offloader.events.append("reads dit2")
        begun.set()
        while not stop():
            pass
        ended.set()

    monkeypatch.setattr(source2, "read_ahead", read_ahead)
    outputs = []

    def work():
        if len(outputs) == 1:
            assert begun.wait(10)
            assert not ended.is_set()
        outputs.append((first, first, second)[len(outputs)](x))

    events = played(offloader, [("dit",), ("dit",), ("dit2",)], work)
    assert [event for event in events if "dit2" in event] == ["prepare dit2", "reads dit2", "denoise dit2"]
    assert ended.is_set()
    for output, expected in zip(outputs, (truth, truth, truth2), strict=True):
        assert torch.equal(output, expected)


def test_weights_in_host_memory_have_nothing_to_read():
    module = nn.Linear(4, 4).requires_grad_(False)
    managed = wrap(module, Policy.preset("cpu-offload", "cpu"))
    before = threading.active_count()
    managed.prepare()
    assert threading.active_count() == before


@pytest.mark.parametrize(("free", "limit"), [(None, file_prefetcher._LIMIT), (600, 300)])
def test_it_takes_half_of_what_is_free_and_leaves_trouble_to_the_reading(monkeypatch, free, limit):
    monkeypatch.setattr(file_prefetcher.devices, "available_memory", lambda device: free)
    seen = []

    class Broken:
        def read_ahead(self, *, limit, stop):
            seen.append(limit)
            raise CorruptFile("changed")

    file_prefetcher.FilePrefetcher(Broken()).stop()
    assert seen == [limit]
