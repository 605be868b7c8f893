"""Uploads through a ring of buffers, on a device with streams and on one without."""

import pytest
import torch

from diffsynth.core.device.upload import UploadRing
from fake_devices import BARE, FULL


@pytest.mark.parametrize("fixture", ["recorded", "bare"])
def test_the_ring_of_buffers_on_both(request, fixture):
    module = request.getfixturevalue(fixture)
    ring = UploadRing(FULL if fixture == "recorded" else BARE, buffers=2, size=8)
    arrived = torch.zeros(8, dtype=torch.uint8)
    for number in range(4):
        with ring.buffer() as buffer:
            buffer.fill_(number)
            ring.upload([(buffer, arrived)])
    ring.wait()
    assert arrived.tolist() == [3] * 8
    if fixture == "recorded":
        waits = [what for who, what in module.log if who == "host"]
        assert waits == ["waits for event1", "waits for event2", "waits for cuda"]
    else:
        assert module.waited == 5
