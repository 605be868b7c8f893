"""The check of steps on a real device: found one step late, and without waiting for the device."""

import torch

from diffsynth.core.finite import LateCheck, nonfinite


def test_a_step_is_known_one_step_late(device):
    check = LateCheck(device)
    bad = torch.tensor([1.0, float("nan")], device=device)
    assert check.add(0, torch.zeros(2, device=device)) is None
    assert check.add(1, bad) is None
    assert check.add(2, torch.zeros(2, device=device)) == 1
    assert check.finish() is None
    check.add(3, bad)
    assert check.finish() == 3


def test_noting_a_step_does_not_wait_for_it(device):
    """The second step is queued while the first still runs: the host comes back long before the device is done."""
    check = LateCheck(device)
    a = torch.randn(4096, 4096, device=device)
    check.add(0, a)
    assert check.finish() is None
    torch.cuda.synchronize(device)
    for _ in range(400):
        a = (a @ a).clamp_(-1, 1)
    check.add(1, a)
    done = torch.cuda.Event()
    done.record()
    assert not done.query()
    assert check.finish() is None


def test_weights_on_a_device_are_looked_at_as_a_whole(device):
    weight = torch.zeros(2**23, dtype=torch.bfloat16, device=device)
    weight[70_000] = float("nan")
    assert nonfinite({"a": weight, "b": torch.zeros(2)}) == ["a"]
