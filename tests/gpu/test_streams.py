"""Streamed blocks on a real device: outputs of the unmanaged module, the planned memory, and no memory left over."""

from __future__ import annotations

import gc
import threading
import time

import pytest
import torch
from tests.core.vram.networks import Tower, tower
from tests.core.vram.sources import emptied, on_disk

from diffsynth.core import device as devices
from diffsynth.core.planning import BlockCall, Speeds, StageCost, StageKind, Workload, plan_memory, spread
from diffsynth.core.vram import Policy, wrap

WIDTH, DEPTH = 2048, 8  # blocks of 64 MiB in fp32
MIB = 2**20
SPEEDS = Speeds(link=25e9, compute=50e12, disk=3e9)
PRESETS = ("none", "cpu-offload", "dynamic", "disk")


@pytest.fixture(scope="module")
def large() -> Tower:
    return tower(width=WIDTH, depth=DEPTH)


@pytest.fixture
def tokens(device) -> torch.Tensor:
    return torch.arange(24, device=device).view(2, 12)


@pytest.fixture
def expected(large, tokens, device) -> torch.Tensor:
    """The output of the unmanaged module on the device."""
    with torch.no_grad():
        out = large.to(device)(tokens)
    large.to("cpu")
    return out


def wrapped_on(device, preset, module, folder):
    source = None
    if preset == "disk":
        source = on_disk(module, folder)
        emptied(module)
    return wrap(module, Policy.preset(preset, device), source=source)


def run(module, tokens, times=3):
    with torch.no_grad():
        outs = [module(tokens) for _ in range(times)]
    devices.synchronize(tokens.device)
    return outs


@pytest.mark.parametrize("slots", [1, 2, 3, DEPTH])
@pytest.mark.parametrize("share", [0.0, 0.42, 1.0])
@pytest.mark.parametrize("preset", PRESETS)
def test_the_bits_of_the_unmanaged_module(preset, share, slots, expected, tokens, device, tmp_path):
    module = tower(width=WIDTH, depth=DEPTH)
    wrapped = wrapped_on(device, preset, module, tmp_path)
    names = wrapped.blocks
    wrapped.configure(resident=[names[i] for i in spread(round(share * len(names)), len(names))], slots=slots)
    with wrapped:
        assert all(torch.equal(out, expected) for out in run(module, tokens))


def test_a_busy_device_changes_no_bit(expected, tokens, device):
    """Copies finish long before computation, so a slot is overwritten too early if no copy waits for its use."""
    module = tower(width=WIDTH, depth=DEPTH)
    wrapped = wrap(module, Policy.preset("cpu-offload", device))
    wrapped.configure(resident=(), slots=2)
    heavy = torch.randn(4096, 4096, device=device)
    for block in module.layers:
        block.register_forward_pre_hook(lambda *_: [heavy @ heavy for _ in range(8)] and None)
    with wrapped:
        assert all(torch.equal(out, expected) for out in run(module, tokens))


def test_memory_is_what_was_planned_and_all_of_it_comes_back(tokens, device):
    module = tower(width=WIDTH, depth=DEPTH)
    wrapped = wrap(module, Policy.preset("cpu-offload", device))
    component = wrapped.footprint("net")
    block_calls = tuple(BlockCall("net", block.name, 10**9) for block in component.blocks)
    load = Workload(
        (component,), (StageCost(StageKind.DENOISE, "denoise", ("net",), MIB, block_calls=block_calls, steps=4),)
    )
    run(module, tokens, 1)  # cuBLAS takes its workspace once
    wrapped.leave()
    gc.collect()
    before = devices.memory_in_use(device)
    for gib in (0, 0.1, 0.15, 0.2, 0.3):
        plan = plan_memory(load, vram_limit=gib, speeds=SPEEDS)
        (component_plan,) = plan.stages[0].components
        wrapped.configure(resident=component_plan.resident, slots=max(component_plan.slots, 1))
        devices.reset_peak_memory(device)
        with wrapped:
            run(module, tokens)
            assert wrapped.device_bytes <= plan.peak_vram
        taken = devices.peak_memory(device) - before
        assert taken <= plan.peak_vram
        assert taken >= 0.8 * (plan.peak_vram - MIB)
        assert devices.memory_in_use(device) == before, "left the stage"
    wrapped.unwrap()


def test_nothing_is_left_after_an_interrupt(tokens, device):
    module = tower(width=WIDTH, depth=DEPTH)
    wrapped = wrap(module, Policy.preset("cpu-offload", device))
    wrapped.configure(resident=(), slots=2)
    run(module, tokens, 1)
    wrapped.leave()
    before, threads = devices.memory_in_use(device), threading.active_count()

    def interrupt(*_):
        raise KeyboardInterrupt

    hook = module.layers[DEPTH // 2].up.register_forward_pre_hook(interrupt)
    with pytest.raises(KeyboardInterrupt), wrapped:
        run(module, tokens, 1)
    hook.remove()
    gc.collect()
    assert (devices.memory_in_use(device), threading.active_count()) == (before, threads)
    first, second = run(module, tokens, 2)
    assert torch.equal(first, second)


def test_pinned_memory_is_given_back(tokens, device):
    def one():
        module = tower(width=WIDTH, depth=DEPTH)
        with wrap(module, Policy.preset("cpu-offload", device)):
            run(module, tokens, 1)

    sizes = []
    for _ in range(4):
        one()
        gc.collect()
        sizes.append(devices.memory_in_use("cpu"))
    weights = 4 * sum(p.numel() for p in tower(width=WIDTH, depth=DEPTH).parameters())
    assert sizes[-1] - sizes[1] < weights / 2, [size // MIB for size in sizes]


def test_copies_overlap_with_computation(tokens, device):
    """A block whose computation takes twice as long as its copy hides it, and the report shows that."""
    module = tower(width=WIDTH, depth=DEPTH)
    wrapped = wrap(module, Policy.preset("cpu-offload", device))
    wrapped.configure(resident=(), slots=2)
    heavy = torch.randn(4096, 4096, device=device)
    run(module, tokens, 2)
    wrapped.report.settle()
    wrapped.report.clear()
    run(module, tokens, 1)
    copy = wrapped.report.settle().seconds_copying / DEPTH
    devices.synchronize(device)
    started = time.perf_counter()
    for _ in range(8):
        heavy @ heavy
    devices.synchronize(device)
    times = max(round(8 * 2 * copy / (time.perf_counter() - started)), 1)
    for block in module.layers:
        block.register_forward_pre_hook(lambda *_: [heavy @ heavy for _ in range(times)] and None)
    run(module, tokens, 2)
    wrapped.report.settle()
    wrapped.report.clear()
    run(module, tokens, 3)
    report = wrapped.report.settle()
    assert report.misses == 0
    assert report.hidden_share > 0.8, str(report)


def test_tiny_z_image_under_every_policy(device, tmp_path):
    from diffsynth_zimage.config import TINY_DIT, tiny_dit_inputs
    from diffsynth_zimage.dit import ZImageDiT

    torch.manual_seed(4)
    weights = ZImageDiT(TINY_DIT).eval().requires_grad_(False).state_dict()
    inputs = tiny_dit_inputs(TINY_DIT, torch.Generator().manual_seed(5))
    inputs = {name: value.to(device) for name, value in inputs.items()}

    def made():
        module = ZImageDiT(TINY_DIT).eval().requires_grad_(False)
        module.load_state_dict(weights)
        return module

    with torch.no_grad():
        expected = made().to(device)(**inputs)
    for preset in PRESETS:
        for slots in (1, 2):
            module = made()
            source = None
            if preset == "disk":
                source = on_disk(module, tmp_path / f"{slots}")
                emptied(module)
            wrapped = wrap(module, Policy.preset(preset, device), source=source, smallest=0)
            wrapped.configure(resident=(), slots=slots)
            with wrapped, torch.no_grad():
                for _ in range(2):
                    assert torch.equal(module(**inputs), expected), (preset, slots)
