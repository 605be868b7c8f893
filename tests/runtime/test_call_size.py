"""Calls that the memory of the machine or of the device certainly cannot hold are refused before anything runs."""

from __future__ import annotations

import pytest
import torch

from diffsynth.errors import NotEnoughMemory
from diffsynth.runtime import architectures, call_size
from tiny_z_image import tiny_z_image

HOST, DEVICE = 64 * 2**30, 2**30


@pytest.fixture
def on_a_device(monkeypatch):
    """Return a tiny pipeline that believes to run on an accelerator of 1 GiB; its calls are checked, not made."""
    pipe = tiny_z_image(with_autoencoder=True)
    pipe.device = torch.device("cuda:0")
    monkeypatch.setattr(call_size, "total_memory", lambda device: HOST if str(device) == "cpu" else DEVICE)
    # The fake device has neither backends nor streams to be asked for.
    monkeypatch.setattr("diffsynth.runtime.checking.check_loop", lambda pipe, request: None)
    return pipe


@pytest.mark.parametrize(
    ("call", "bytes_at_least"),
    [
        # pixels in fp32 against the latents: 16 channels, 8 x 8 pixels, 8 bytes for latents and velocity
        ({"height": 9600, "width": 9600}, 3 * 9600**2 * 4),
        ({"height": 9600, "width": 9600, "output_type": "tensor"}, 3 * 9600**2 * 4),
        ({"height": 1024, "width": 1024, "num_images": 100}, 3 * 1024**2 * 100 * 4),
        ({"height": 32000, "width": 32000, "output_type": "latents"}, 16 * 4000**2 * 8),
    ],
)
def test_the_bound_is_that_of_the_largest_tensors(on_a_device, call, bytes_at_least):
    assert bytes_at_least > DEVICE
    with pytest.raises(NotEnoughMemory, match=r"result\(s\) of height=\d+, width=\d+ take at least 1 GiB, and cuda:0"):
        on_a_device.check(prompt="a", **call)
    half = {name: call[name] // 2 for name in ("height", "width", "num_images") if name in call}
    assert on_a_device.check(prompt="a", **{**call, **half}).batch_size == half.get("num_images", 1)


def test_weights_on_the_device_count(on_a_device, monkeypatch):
    call = {"prompt": "a", "height": 8192, "width": 8192}
    on_a_device.check(**call)
    monkeypatch.setattr(call_size, "resident_weights", lambda pipe: DEVICE // 2)
    with pytest.raises(NotEnoughMemory, match=r"take at least 0 GiB beside 0\.5 GiB of weights.*a vram_limit"):
        on_a_device.check(**call)


def test_a_streamed_network_counts_with_its_largest_block(monkeypatch):
    cuts = architectures.cuts
    monkeypatch.setattr(architectures, "cuts", lambda architecture: cuts(architecture) | {"smallest": 0})
    plain = tiny_z_image()
    size = sum(weight.nbytes for weight in plain.dit.parameters())
    everything = sum(weight.nbytes for role in ("dit", "text_encoder") for weight in plain.parts[role].parameters())
    assert (call_size.least_loop_weights(plain), call_size.resident_weights(plain)) == (0, everything)
    for role in ("dit", "text_encoder"):
        plain.parts[role].requires_grad_(False)
    streamed = type(plain)(plain.components, device="cpu", torch_dtype=torch.float32, policy="cpu-offload")
    assert 0 < call_size.least_loop_weights(streamed) < size
    assert call_size.resident_weights(streamed) == 0


def test_host_memory_holds_the_results(monkeypatch):
    pipe = tiny_z_image(with_autoencoder=True)
    monkeypatch.setattr(call_size, "total_memory", lambda device: 2**30)
    call = {"prompt": "a", "height": 16384, "width": 16384}
    with pytest.raises(NotEnoughMemory, match=r"1 result\(s\) of height=16384, width=16384 take at least 4 GiB"):
        pipe.check(**call)
    pipe.check(**call, output_type="latents")


def test_a_plan_takes_the_place_of_the_bound(on_a_device):
    on_a_device.plan_cache = object()
    on_a_device.check(prompt="a", height=16384, width=16384)
