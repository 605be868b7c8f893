"""On every device that this machine has: what the tables say is so. On a machine without a GPU that is the CPU."""

import pytest
import torch

from diffsynth.core import device as devices
from diffsynth.core.device import backends
from diffsynth.core.device.upload import UploadRing

MIB = 2**20
every_device = pytest.mark.parametrize("device", devices.present_devices())


@every_device
def test_converts_what_the_table_says(device):
    lacks = backends.BACKENDS[devices.parse_device_type(device)].lacks
    for dtype in backends.CONVERTIBLE:
        if dtype in lacks:
            continue
        ones = torch.ones(4, device=device, dtype=torch.complex64 if dtype.is_complex else torch.float32)
        assert torch.equal(ones.to(dtype).to(ones.dtype), ones), dtype


@every_device
def test_nothing_converts_packed_dtypes(device):
    with pytest.raises((NotImplementedError, RuntimeError, TypeError)):
        torch.ones(4, device=device).to(torch.float4_e2m1fn_x2)


@every_device
def test_a_device_is_what_its_tensors_say(device):
    assert devices.check_device(device) == torch.zeros(1, device=device).device


@every_device
def test_a_block_copied_by_the_side_stream_is_there_when_it_is_waited_for(device):
    host = devices.pinned_memory(16 * MIB, device).fill_(7)
    there = torch.zeros(16 * MIB, dtype=torch.uint8, device=device)
    side = devices.side_stream(device)
    side.wait(devices.mark(device))
    with side.run():
        there.copy_(host, non_blocking=True)
    devices.wait_for(side.mark(), device)
    assert int(there.sum(dtype=torch.int64)) == 7 * 16 * MIB
    assert host.is_pinned() == (side.overlaps and backends.BACKENDS[devices.parse_device_type(device)].pins)


@every_device
def test_a_long_copy_takes_longer_than_a_short_one(device):
    side = devices.side_stream(device)

    def seconds(size):
        host, there = devices.pinned_memory(size, device).fill_(1), torch.zeros(size, dtype=torch.uint8, device=device)
        side.wait(devices.mark(device))
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


@every_device
def test_memory_is_counted(device):
    total = devices.total_memory(device)
    if total is None:
        pytest.skip("this device does not tell")
    free = devices.available_memory(device)
    assert free is None or 0 < free <= total
    before = devices.memory_in_use(device)
    held = torch.ones(128 * MIB, dtype=torch.uint8, device=device)
    assert 100 * MIB < devices.memory_in_use(device) - before < 200 * MIB
    if devices.reset_peak_memory(device):
        del held
        assert devices.peak_memory(device) - before > 100 * MIB


@every_device
def test_random_numbers_go_on_where_they_were(device):
    state = devices.random_state(device)
    first = torch.rand(3, device=device)
    devices.set_random_state(state, device)
    assert torch.equal(torch.rand(3, device=device), first)
