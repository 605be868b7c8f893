"""The stream of blocks on a device with queues, in the worst order that its waits allow: never a wrong weight."""

import random
import threading
import time
from types import SimpleNamespace

import pytest
import torch

from diffsynth.core.device import backends
from diffsynth.core.vram import block_weights as block_weights_module
from diffsynth.core.vram import stream as stream_module
from diffsynth.core.vram.report import TransferReport
from diffsynth.core.vram.stream import BlockOrder, BlockStream
from slow_device import LockedTensor, SlowDevice

SIZE = 32


class FakeWeights:
    """A block whose bytes are all its number; pinned, or read by the thread."""

    def __init__(self, number: int, *, locked: bool) -> None:
        self.packing = SimpleNamespace(stored_bytes=SIZE - number % 3)
        self.content = torch.full((SIZE - number % 3,), number, dtype=torch.uint8)
        self.memory = self.content.as_subclass(LockedTensor) if locked else None

    def fill(self, memory: torch.Tensor) -> None:
        memory.copy_(self.content)


@pytest.fixture(params=["main", "side", "either"])
def device(request, monkeypatch):
    """Host memory as usual, and a device whose memory is a `SlowTensor`."""
    slow = SlowDevice(prefer=request.param)
    monkeypatch.setattr(backends, "torch_module", {"cuda": slow}.get)
    allocate = torch.empty

    def empty(*size, device=None, pin_memory=False, **options):
        on_device = device is not None and torch.device(device).type == "cuda"
        return slow.tensor(*size) if on_device else allocate(*size, device=device, **options)

    for module in (stream_module, block_weights_module):
        monkeypatch.setattr(module.torch, "empty", empty)
    return slow


def run(slow, orders, *, locked, slots):
    """Run blocks in these orders; return the wrong weights that were read, the number of calls, and the report."""
    names = [f"block{number}" for number in range(7)]
    block_weights = {name: FakeWeights(number, locked=locked(number)) for number, name in enumerate(names)}
    report, order = TransferReport(), BlockOrder(names)
    stream = BlockStream(block_weights, torch.device("cuda", 0), slots=slots, order=order, report=report)
    wrong, turns = [], 0
    for numbers in orders:
        order.begin_stage()
        for number in numbers:
            name = f"block{number}"
            order.called(name)
            memory = stream.acquire(name).as_subclass(torch.Tensor)[: SIZE - number % 3]

            def compute(memory=memory, number=number):
                if memory.tolist() != [number] * memory.numel():
                    wrong.append((number, memory.tolist()))

            slow.submit(compute)
            stream.release(name)
            turns += 1
    stream.close()
    slow.synchronize()
    return wrong, turns, report


LOCKED = {
    "locked": lambda number: True,
    "ordinary": lambda number: False,
    "mixed": lambda number: number % 2 == 0,
}


@pytest.mark.parametrize("kind", LOCKED)
@pytest.mark.parametrize("slots", [1, 2, 3, 7])
def test_every_computation_reads_its_own_block(device, kind, slots):
    dice = random.Random(slots)
    orders = [range(7), range(7), *([dice.randrange(7) for _ in range(9)] for _ in range(3)), range(7)]
    wrong, turns, report = run(device, orders, locked=LOCKED[kind], slots=slots)
    assert wrong == []
    assert report.hits + report.misses == turns


def test_a_wrong_guess_does_not_come_late(device, monkeypatch):
    """The thread is at a block in ordinary memory when a pinned one takes its slot: 'mixed', above, by luck."""
    gate, fill, read = threading.Event(), FakeWeights.fill, []

    def fill_late(self, memory):
        assert gate.wait(10)
        fill(self, memory)

    monkeypatch.setattr(FakeWeights, "fill", fill_late)
    block_weights = {"guessed": FakeWeights(1, locked=False), "wanted": FakeWeights(0, locked=True)}
    order, report = BlockOrder(list(block_weights)), TransferReport()
    stream = BlockStream(block_weights, torch.device("cuda", 0), slots=1, order=order, report=report)
    timer = threading.Timer(0.05, gate.set)
    timer.start()
    memory = stream.acquire("wanted").as_subclass(torch.Tensor)
    timer.join()
    deadline = time.monotonic() + 10
    while report.bytes_moved < sum(each.packing.stored_bytes for each in block_weights.values()):
        assert time.monotonic() < deadline, "the thread did not copy the block that it read"
    device.submit(lambda: read.extend(memory.tolist()))
    stream.release("wanted")
    stream.close()
    device.synchronize()
    assert set(read) == {0}


@pytest.mark.parametrize("broken", ["copies do not wait", "computation does not wait"])
def test_a_missing_wait_is_seen(device, broken, monkeypatch):
    """The device of this file finds what it is there to find, in one of its orders."""
    if broken == "copies do not wait":
        monkeypatch.setattr("diffsynth.core.device.streams.OverlappingStream.wait_event", lambda self, event: None)
        found_by = "side"
    else:
        monkeypatch.setattr("diffsynth.core.device.wait_event", lambda event, device: None)
        found_by = "main"
    wrong, _, _ = run(device, [range(7)] * 2, locked=LOCKED["locked"], slots=2)
    assert device.prefer == "either" or (wrong != []) == (device.prefer == found_by)


def test_the_host_waits_for_nothing_when_everything_is_pinned(device, monkeypatch):
    """Two passes are given to the device before it has done the first step of them."""
    done = []
    monkeypatch.setattr(device, "go_on", lambda enough: done.append(enough))
    run(device, [range(7)] * 2, locked=LOCKED["locked"], slots=3)
    assert len(done) == 1  # that of this test's own end
