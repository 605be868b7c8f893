"""The tables hold on every device of this machine, on a machine without a GPU the CPU."""

import ctypes
import gc

import pytest
import torch

from diffsynth.core import device as devices
from diffsynth.core.device import backends
from diffsynth.core.device.upload import UploadRing

MIB = 2**20
every_device = pytest.mark.parametrize("device", devices.present_devices())


@every_device
def test_converts_what_the_table_says(device):
    unsupported = backends.BACKENDS[devices.parse_device_type(device)].unsupported_dtypes
    for dtype in backends.CONVERTIBLE:
        if dtype in unsupported:
            continue
        ones = torch.ones(4, device=device, dtype=torch.complex64 if dtype.is_complex else torch.float32)
        assert torch.equal(ones.to(dtype).to(ones.dtype), ones), dtype


@every_device
def test_nothing_converts_packed_dtypes(device):
    with pytest.raises((NotImplementedError, RuntimeError, TypeError)):
        torch.ones(4, device=device).to(torch.float4_e2m1fn_x2)


@every_device
def test_a_checked_device_is_that_of_its_tensors(device):
    assert devices.check_device(device) == torch.zeros(1, device=device).device


@every_device
def test_a_copy_on_the_side_stream_is_done_after_its_event(device):
    host = devices.pinned_memory(16 * MIB, device).fill_(7)
    there = torch.zeros(16 * MIB, dtype=torch.uint8, device=device)
    side = devices.side_stream(device)
    side.wait_event(devices.record_event(device))
    with side.run():
        there.copy_(host, non_blocking=True)
    devices.wait_event(side.record_event(), device)
    assert int(there.sum(dtype=torch.int64)) == 7 * 16 * MIB
    assert host.is_pinned() == (side.overlaps and backends.BACKENDS[devices.parse_device_type(device)].pinned_memory)


@every_device
def test_a_long_copy_takes_longer_than_a_short_one(device):
    side = devices.side_stream(device)

    def seconds(size):
        host, there = devices.pinned_memory(size, device).fill_(1), torch.zeros(size, dtype=torch.uint8, device=device)
        side.wait_event(devices.record_event(device))
        start = side.timestamp()
        with side.run():
            there.copy_(host, non_blocking=True)
        return side.timestamp().seconds_since(start)

    seconds(MIB)
    assert 0 < min(seconds(MIB) for _ in range(3)) < min(seconds(64 * MIB) for _ in range(3))


@every_device
def test_the_ring_uploads(device):
    ring = UploadRing(device, buffers=2, size=MIB)
    there = torch.zeros(8, MIB, dtype=torch.uint8, device=device)
    for number in range(8):
        with ring.buffer() as buffer:
            buffer.fill_(number)
            ring.upload([(buffer, there[number])])
    ring.wait()
    assert there[:, -1].tolist() == list(range(8))


def return_freed_pages() -> None:
    """Give the heap's free pages back to the system: glibc keeps those of freed tensors of up to 32 MiB that lie below
    a block in use, and takes the next tensor from them, so that the process does not grow by it.
    """
    gc.collect()
    if trim := getattr(ctypes.CDLL(None), "malloc_trim", None):
        trim(0)


@every_device
def test_memory_in_use_and_peak(device):
    total = devices.total_memory(device)
    if total is None:
        pytest.skip("the memory of this device is unknown")
    free = devices.available_memory(device)
    assert free is None or 0 < free <= total
    return_freed_pages()
    before = devices.memory_in_use(device)
    held = torch.ones(128 * MIB, dtype=torch.uint8, device=device)
    assert 100 * MIB < devices.memory_in_use(device) - before < 200 * MIB
    if devices.reset_peak_memory(device):
        del held
        assert devices.peak_memory(device) - before > 100 * MIB


@every_device
def test_a_restored_random_state_repeats_the_numbers(device):
    state = devices.random_state(device)
    first = torch.rand(3, device=device)
    devices.set_random_state(state, device)
    assert torch.equal(torch.rand(3, device=device), first)
