"""Streams and events, on a device that records what it is given and on one that has neither."""

import time

import pytest
import torch

from diffsynth.core import device as devices
from fake_devices import BARE, FULL, Bare, Event, Recorded, Stream


def test_a_copy_on_the_side_stream_runs_between_its_events(recorded):
    side = devices.side_stream("cuda:1")
    assert side.overlaps
    recorded.work("computes block 0")
    used = devices.record_event("cuda:1")
    side.wait_event(used)
    with side.run():
        recorded.work("copies block 1")
    copied = side.record_event()
    recorded.work("computes on")
    devices.wait_event(copied, "cuda:1")
    recorded.work("computes block 1")
    name = "side1 of cuda:1"
    assert recorded.log == [
        ("main", "computes block 0"),
        ("main", "records event1"),
        (name, "waits for event1"),
        (name, "copies block 1"),
        (name, "records event2"),
        ("main", "computes on"),
        ("main", "waits for event2"),
        ("main", "computes block 1"),
    ]


def test_leaving_the_side_stream_by_an_error_leaves_it(recorded):
    with pytest.raises(KeyboardInterrupt), devices.side_stream(FULL).run():
        raise KeyboardInterrupt
    assert recorded.current.name == "main"


def test_nothing_to_wait_for(recorded):
    side = devices.side_stream(FULL)
    side.wait_event(None)
    devices.wait_event(None, FULL)
    assert recorded.log == []


@pytest.mark.parametrize("device", ["cpu", f"{BARE}:0"])
def test_without_streams_all_happens_in_order(bare, device):
    side = devices.side_stream(device)
    assert not side.overlaps
    done = []
    with side.run():
        done.append("inside")
    event = side.record_event()
    assert (event, devices.record_event(device), done) == (None, None, ["inside"])
    side.wait_event(event)
    devices.wait_event(event, device)
    assert bare.waited == (0 if device == "cpu" else 2)  # without events the host waits at once
    with pytest.raises(ValueError, match="'an event': (CPU|Toy) has no events"):
        side.wait_event("an event")


def test_times_are_those_of_the_stream(recorded):
    side = devices.side_stream(FULL)
    start, on_main, end = side.timestamp(), devices.timestamp(FULL), side.timestamp()
    assert end.seconds_since(start) == 2
    assert on_main.seconds_since(start) == 1
    assert [what for _, what in recorded.log[:3]] == ["records event1", "records event2", "records event3"]
    assert recorded.log[3:] == [
        ("host", "waits for event3"),
        ("host", "waits for event2"),
    ]  # no wait before the time is read


@pytest.mark.parametrize("device", ["cpu", BARE])
def test_times_without_streams_are_those_of_the_host(bare, device):
    side = devices.side_stream(device)
    start = side.timestamp()
    time.sleep(0.002)
    assert 0.002 <= devices.timestamp(device).seconds_since(start) < 1


def test_the_cpu_has_nothing_to_wait_for():
    assert devices.synchronize("cpu") is None
    assert devices.empty_cache("cpu") is None


def test_waiting_for_a_device(recorded, bare):
    devices.synchronize(BARE)
    assert bare.waited == 1
    devices.synchronize("cpu")
    devices.empty_cache("cpu")
    with pytest.raises(ValueError, match="device type 'meta': expected one of cuda, npu, mps, cpu"):
        devices.synchronize("meta")


def test_the_fakes_have_no_name_that_torch_lacks():
    ours = {"log", "count", "streams", "events", "current", "work"}
    for names, real in (
        (names_of(Recorded()) - ours, torch.cuda),
        (names_of(Bare()) - {"waited", "is_available"}, torch.mps),
        ({"recommended_max_memory", "current_allocated_memory"}, torch.mps),
        (names_of(Stream), torch.cuda.Stream),
        (names_of(Event), torch.cuda.Event),
    ):
        assert [name for name in names if not hasattr(real, name)] == []


def names_of(thing):
    return {name for name in dir(thing) if not name.startswith("_")}
