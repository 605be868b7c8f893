"""Older code's names for the engine: a module map, eight keys and a disk map; outputs are the plain module's."""

from __future__ import annotations

import logging

import pytest
import torch
from safetensors.torch import save_file
from tests.core.vram.networks import Layer, tower
from tests.core.vram.sources import emptied
from torch import nn

from diffsynth.compat import vram as compat_vram
from diffsynth.core import (
    AutoTorchModule,
    AutoWrappedLinear,
    AutoWrappedModule,
    AutoWrappedNonRecurseModule,
    DiskMap,
    enable_vram_management,
    enable_vram_management_recursively,
    fill_vram_config,
)
from diffsynth.core.vram import managed, partition, wrap
from diffsynth.core.vram import partition as cutting
from diffsynth.errors import KeyMismatch, NotEnoughMemory

TOKENS = torch.arange(12).view(2, 6)
STATES = ("offload", "onload", "preparing", "computation")
HOST = {f"{state}_device": "cpu" for state in STATES} | {f"{state}_dtype": torch.float32 for state in STATES}
DISK = HOST | {f"{state}_{part}": "disk" for state in STATES[:2] for part in ("device", "dtype")}
LINEAR = {nn.Linear: AutoWrappedLinear, nn.LayerNorm: AutoWrappedModule}
GIB = 2**30


@pytest.fixture(autouse=True)
def every_layer_travels(monkeypatch):
    """Tiny layers are below the size that is worth a transfer."""

    monkeypatch.setattr(compat_vram, "wrap", lambda *args, **cuts: wrap(*args, smallest=0, **cuts))


@pytest.fixture
def net(tmp_path):
    """On meta, and the map of its file."""
    module = tower()
    save_file({name: p.clone() for name, p in module.named_parameters()}, tmp_path / "net.safetensors")
    return emptied(module), DiskMap(tmp_path / "net.safetensors", "cpu")


def test_the_public_names_are_functions():
    """Both are modules, too, and importing one of those must not take the name away."""
    assert callable(managed)
    assert callable(partition)
    assert cutting is partition


@pytest.mark.parametrize("module_map", [None, {}, LINEAR, {Layer: AutoWrappedNonRecurseModule, **LINEAR}], ids=str)
@pytest.mark.parametrize("vram_limit", [None, 0, 0.001, 1])
def test_from_disk(net, module_map, vram_limit):
    module, disk_map = net
    assert enable_vram_management(module, module_map, DISK, vram_limit, disk_map) is module
    assert module.vram_management_enabled
    for _ in range(3):
        assert torch.equal(module(TOKENS), tower()(TOKENS))
    assert managed(module).report.bytes_moved > 0
    managed(module).unwrap()
    assert not hasattr(module, "vram_management_enabled")


def test_layers_of_the_map_are_what_travels(net):
    """A head took the weight away that it shares with an embedding, which is no layer of the map. Such heads stay."""
    module, disk_map = net
    enable_vram_management(module, {Layer: AutoWrappedModule, nn.Linear: AutoWrappedLinear}, DISK, None, disk_map)
    assert managed(module).blocks == (*(f"layers.{i}" for i in range(6)), "final.1")


def test_the_first_entry_that_fits_counts(net):
    module, disk_map = net
    enable_vram_management(
        module, {Layer: AutoWrappedNonRecurseModule, nn.Linear: AutoWrappedLinear}, DISK, None, disk_map
    )
    assert managed(module).blocks == (*(f"layers.{i}.{part}" for i in range(6) for part in ("up", "down")), "final.1")


def test_a_model_in_its_own_map_is_moved_as_a_whole(net, caplog):
    module, disk_map = net
    with caplog.at_level(logging.INFO):
        enable_vram_management(module, {type(module): AutoWrappedModule}, DISK, None, disk_map)
    assert "as a whole" in caplog.text
    assert managed(module).blocks == ()
    assert not managed(module).policy.onload.on_disk
    assert torch.equal(module(TOKENS), tower()(TOKENS))


def test_a_part_of_a_model_under_its_prefix(net):
    module, disk_map = net
    enable_vram_management_recursively(module.layers[2], LINEAR, DISK, 0, "layers.2", disk_map)
    x = torch.randn(2, 32)
    assert torch.equal(module.layers[2](x), tower().layers[2](x))


def test_weights_in_memory(caplog):
    module = tower().requires_grad_(True)
    with caplog.at_level(logging.WARNING):
        enable_vram_management(module, LINEAR, HOST, vram_limit=2.0)
    assert torch.equal(module(TOKENS), tower()(TOKENS))
    assert "vram_limit=2.0 has no effect" in caplog.text
    assert not any(parameter.requires_grad for parameter in module.parameters())


def test_a_limit_is_on_the_weights_of_this_module(net):
    module, disk_map = net
    enable_vram_management(module, None, DISK, 0, disk_map)
    handle, load = managed(module), managed(module).footprint()
    assert handle.resident == frozenset()
    assert handle.slots == 1
    whole = load.whole
    for limit in (whole / GIB, load.on_device({"layers.1", "layers.4"}, slots=2) / GIB):
        handle.unwrap()
        enable_vram_management(emptied(module), None, DISK, limit, disk_map)
        handle = managed(module)
        with handle:
            assert torch.equal(module(TOKENS), tower()(TOKENS))
            assert handle.device_bytes <= limit * GIB
    assert 1 <= len(handle.resident) < len(handle.blocks)
    handle.unwrap()
    with pytest.raises(NotEnoughMemory, match="one layer at a time they take"):
        enable_vram_management(emptied(module), None, DISK, load.rest / GIB, disk_map)
    assert managed(module) is None


def test_fill_vram_config():
    filled = fill_vram_config(tower(), DISK)
    assert filled == DISK | {"onload_device": "cpu", "onload_dtype": torch.float32}
    assert DISK["onload_device"] == "disk", "the argument is left alone"
    with pytest.raises(ValueError, match="no computation_device and no computation_dtype"):
        fill_vram_config(tower(), {"offload_device": "cpu"})


class Custom(AutoWrappedModule):
    """Somebody's own wrapper."""


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"module_map": {nn.Conv1d: AutoWrappedModule}}, ValueError, "module_map: Conv1d"),
        ({"module_map": {nn.Linear: Custom}}, TypeError, "Code of a wrapper would never run"),
        ({"module_map": {nn.Linear: AutoTorchModule}}, TypeError, "expected a module class and one of AutoWrappedMod"),
        ({"module_map": {"torch.nn.Linear": AutoWrappedLinear}}, TypeError, "expected a module class"),
        ({"vram_config": {}}, ValueError, "vram_config is empty"),
        ({"vram_config": HOST | {"ofload_device": "cpu"}}, ValueError, "did you mean 'offload_device'"),
        ({"vram_config": {"onload_device": "cpu", "onload_dtype": torch.float32}}, ValueError, "without offload_dev"),
        ({"vram_config": DISK}, ValueError, "block by block.*offload_device='cpu'"),
        ({"vram_config": HOST | {"computation_device": "cuda:9"}}, ValueError, "cuda:9"),
        ({"vram_limit": -1}, ValueError, "vram_limit=-1"),
        ({"quantize": "fp8"}, NotImplementedError, "quantize='fp8'"),
    ],
)
def test_what_is_refused(arguments, error, message):
    module = tower()
    with pytest.raises(error, match=message):
        enable_vram_management(module, **({"module_map": None, "vram_config": HOST} | arguments))
    assert managed(module) is None


def test_a_pickle_on_disk_is_refused_with_the_command(tmp_path):
    module = tower()
    torch.save(module.state_dict(), tmp_path / "net.pth")
    with pytest.raises(ValueError, match=r"diffsynth convert .*net\.pth -o model\.safetensors"):
        enable_vram_management(emptied(module), None, DISK, disk_map=DiskMap(tmp_path / "net.pth", "cpu"))
    enable_vram_management(module, None, HOST, disk_map=DiskMap(tmp_path / "net.pth", "cpu"))
    assert torch.equal(module(TOKENS), tower()(TOKENS))


def test_a_file_that_does_not_fit(net):
    with pytest.raises(KeyMismatch, match="does not fit Sequential"):
        enable_vram_management(nn.Sequential(nn.Linear(2, 3)), None, DISK, disk_map=net[1])


def test_a_wrapper_class_has_no_instances():
    with pytest.raises(TypeError, match="value for module_map"):
        AutoWrappedLinear(nn.Linear(2, 3), offload_device="cpu")
