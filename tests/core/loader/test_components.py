"""Files that hold several components, wrapped, fused or split, for a test family."""

import dataclasses
import logging

import pytest
import torch
from safetensors.torch import save_file

from diffsynth.core.loader import component, header, pickled
from diffsynth.core.loader.checkpoint import read_files
from diffsynth.core.loader.reader import source
from diffsynth.core.loader.reader.blocks import BlockReader
from diffsynth.core.loader.recognize import recognize
from diffsynth.core.loader.save import save_checkpoint
from diffsynth.errors import KeyMismatch, NotEnoughMemory, Unrecognized


def state_of(module):
    return {name: torch.randn_like(t) if t.is_floating_point() else t + 7 for name, t in module.state_dict().items()}


@pytest.fixture
def net(toy):
    return state_of(toy.Net(toy.NetConfig()))


@pytest.fixture
def head(toy):
    return state_of(toy.Head(toy.NetConfig()))


def fused(net):
    """Return the same weights in the other layout."""
    tensors = {key.replace("norm.", "final_norm."): value for key, value in net.items() if "layers" not in key}
    for n in range(2):
        tensors[f"blocks.{n}.qkv.weight"] = torch.cat([net[f"layers.{n}.{part}.weight"] for part in "qkv"])
    return tensors | {"unread": torch.zeros(1)}


def under(prefix, tensors):
    return {f"{prefix}{key}": value for key, value in tensors.items()}


def recognized(toy, tensors, **options):
    return recognize(tensors, toy.ARCHITECTURES, toy.CHECKPOINTS, **options)


def load_all(toy, tensors, **options):
    arguments = {"device": "cpu", "dtype": torch.float32} | options
    return {
        found.architecture.name: component.load_component(found, tensors, **arguments)
        for found in recognized(toy, tensors)
    }


def same(module, tensors):
    return all(torch.equal(value, tensors[name]) for name, value in module.state_dict().items())


def test_two_components_of_one_file_do_not_share_keys(toy, net, head):
    both = pickled.of_state_dict(net | head)
    found = recognized(toy, both)
    assert {one.architecture.name for one in found} == {"net", "head"}
    assert not set(found[0].keys) & set(found[1].keys)
    assert [one.extra for one in found] == [(), ()]
    modules = load_all(toy, both)
    assert same(modules["net"], net)
    assert same(modules["head"], head)


def test_everything_in_one_file_under_prefixes(toy, net, head, tmp_path, caplog):
    tensors = under("model.diffusion_model.", fused(net)) | under("first_stage_model.", head) | {"ema": torch.ones(1)}
    save_file(tensors, tmp_path / "all.safetensors")
    with caplog.at_level(logging.WARNING):
        modules = load_all(toy, read_files([tmp_path / "all.safetensors"]))
    assert same(modules["net"], net)
    assert same(modules["head"], head)
    assert "1 key is not used: ema" in caplog.text


@pytest.mark.parametrize("suffix", [".safetensors", ".pth", ".legacy.pt"])
def test_a_fused_file_loads_from_every_container(toy, net, tmp_path, suffix):
    file = tmp_path / f"net{suffix}"
    if suffix == ".safetensors":
        save_file(fused(net), file)
    else:
        torch.save({"module": fused(net)}, file, _use_new_zipfile_serialization="legacy" not in suffix)
    modules = load_all(toy, read_files([file]))
    assert same(modules["net"], net)
    assert torch.equal(modules["net"].table, torch.arange(3.0))
    file.write_bytes(bytes(file.stat().st_size))
    assert same(modules["net"], net)


def test_part_of_the_rows_is_read_for_a_part(toy, net, tmp_path, monkeypatch):
    """A split along the first axis once read the whole source for each part."""
    save_file(fused(net), tmp_path / "net.safetensors")
    read, call = [], BlockReader._read

    def spy(self, file, start, landings):
        read.extend(landing.numel() * landing.element_size() for landing in landings)
        call(self, file, start, landings)

    monkeypatch.setattr(BlockReader, "_read", spy)
    tensors = read_files([tmp_path / "net.safetensors"])
    load_all(toy, tensors)
    assert sum(read) == sum(info.end - info.start for key, info in tensors.tensors.items() if key != "unread")


def test_fused_parts_are_joined(toy, head):
    parts = {"proj.a": head["proj.weight"][:1], "proj.b": head["proj.weight"][1:], "proj.bias": head["proj.bias"]}
    assert same(load_all(toy, pickled.of_state_dict(parts))["head"], head)


def test_two_architectures_that_claim_the_same_keys_are_no_answer(toy, net):
    second = dataclasses.replace(toy.ARCHITECTURES["net"], name="second")
    checkpoints = (*toy.CHECKPOINTS, dataclasses.replace(toy.CHECKPOINTS[0], name="second", architecture="second"))
    with pytest.raises(Unrecognized, match="claimed by net and second alike"):
        recognize(pickled.of_state_dict(net), toy.ARCHITECTURES | {"second": second}, checkpoints)


def test_a_broken_tensor_shape_is_a_no_not_a_crash(toy):
    with pytest.raises(Unrecognized):
        recognized(toy, pickled.of_state_dict({"proj.weight": torch.zeros(()), "proj.bias": torch.zeros(2)}))


def test_metadata_that_is_not_json(toy, tmp_path):
    save_file(
        {"a": torch.zeros(1)}, tmp_path / "x.safetensors", {"diffsynth.architecture": "net", "diffsynth.config": "{"}
    )
    with pytest.raises(Unrecognized, match=r"diffsynth\.config does not fit toy_loader:NetConfig"):
        recognized(toy, read_files([tmp_path / "x.safetensors"]))


def test_an_unknown_tier(toy, net):
    with pytest.raises(ValueError, match="did you mean 'structure'"):
        recognized(toy, pickled.of_state_dict(net), tiers=("structur",))


def test_low_storage_keeps_what_needs_precision(toy, net):
    module = load_all(toy, pickled.of_state_dict(net), dtype=torch.float8_e4m3fn)["net"]
    assert module.layers[0]["q"].weight.dtype == torch.float8_e4m3fn
    assert module.norm.weight.dtype == torch.float32
    module = load_all(toy, pickled.of_state_dict(net), dtype=torch.bfloat16)["net"]
    assert module.norm.weight.dtype == torch.bfloat16
    assert (module.count.dtype, int(module.count)) == (torch.int64, 7)


def test_memory_counts_the_sources_that_are_held_at_once(toy, net, tmp_path, monkeypatch):
    """A split along the last axis cannot be read in place: its source is held beside the weights."""
    monkeypatch.setattr(toy, "FUSED", (dataclasses.replace(toy.FUSED[0], dim=1), *toy.FUSED[1:]))
    tensors = fused(net)
    for n in range(2):
        tensors[f"blocks.{n}.qkv.weight"] = torch.cat([net[f"layers.{n}.{part}.weight"] for part in "qkv"], dim=1)
    save_file(tensors, tmp_path / "net.safetensors")
    model = sum(value.numel() * 4 for value in net.values() if value.is_floating_point()) + 8
    one = 4 * 12 * 4
    for allowed, held in ((2**28, 6 * one), (1, one)):
        monkeypatch.setattr(source, "_WORK", allowed)
        monkeypatch.setattr(component.devices, "available_memory", lambda device, held=held: model + held)
        assert same(load_all(toy, read_files([tmp_path / "net.safetensors"]))["net"], net)
        monkeypatch.setattr(component.devices, "available_memory", lambda device, held=held: model + held - 1)
        with pytest.raises(NotEnoughMemory, match=r"net\.safetensors needs .* on cpu.*Nothing was read"):
            load_all(toy, read_files([tmp_path / "net.safetensors"]))


def test_a_module_that_leaves_a_buffer_on_meta_is_named(toy, net, monkeypatch):
    monkeypatch.setattr(toy.Net, "reset_buffers", lambda self: None)
    with pytest.raises(KeyMismatch, match="Net has buffers that no file holds: table"):
        load_all(toy, pickled.of_state_dict(net))


def test_a_file_that_shrank_since_its_header_was_read(toy, net, tmp_path):
    file = tmp_path / "net.safetensors"
    save_file(net, file)
    tensors = read_files([file])
    file.write_bytes(file.read_bytes()[:-16])
    with pytest.raises(header.CorruptFile, match="changed since its header was read: it had"):
        load_all(toy, tensors)


def test_a_signature_leaves_no_key_unused(toy, net):
    checkpoints = (
        dataclasses.replace(
            toy.CHECKPOINTS[0], signature=header.signature({k: tuple(t.shape) for k, t in net.items()})
        ),
    )
    tensors = pickled.of_state_dict(net)
    (found,) = recognize(tensors, toy.ARCHITECTURES, checkpoints)
    assert found.tier == "signature"
    wide = dataclasses.replace(found, config=toy.NetConfig(layers=1))
    with pytest.raises(KeyMismatch, match=r"3 unknown \(layers\.1\.[qkv]\.weight"):
        component.load_component(wide, tensors, device="cpu", dtype=torch.float32)


def test_tied_weights_are_saved_twice_and_come_back(toy, net, tmp_path):
    module = toy.Net(toy.NetConfig())
    module.layers[1]["q"].weight = module.layers[0]["q"].weight
    save_checkpoint(module, tmp_path / "x.safetensors", architecture="net", config=module.config)
    assert same(load_all(toy, read_files([tmp_path / "x.safetensors"]))["net"], module.state_dict())


def test_what_cannot_be_saved(toy, tmp_path):
    module = toy.Head(toy.NetConfig())
    with pytest.raises(ValueError, match="which save_checkpoint writes itself"):
        save_checkpoint(
            module, tmp_path / "x", architecture="head", config=module.config, metadata={"diffsynth.config": "{}"}
        )
    with pytest.raises(ValueError, match=r"proj\.weight of Head is on the meta device"):
        save_checkpoint(module.to("meta"), tmp_path / "x", architecture="head", config=module.config)
