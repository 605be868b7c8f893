import dataclasses
import logging

import pytest
import torch
from safetensors.torch import load_file, save_file

from diffsynth import _discovery
from diffsynth.core.loader import component, pickled
from diffsynth.core.loader.checkpoint import read_files
from diffsynth.core.loader.reader.blocks import BlockReader
from diffsynth.core.loader.recognize import recognize
from diffsynth.core.loader.save import save_checkpoint
from diffsynth.core.vram import Policy, wrap
from diffsynth.errors import CorruptFile, KeyMismatch, NotEnoughMemory
from diffsynth.models.config import TINY_FLUX_AUTOENCODER, TINY_QWEN3_TEXT_ENCODER
from diffsynth.models.flux_autoencoder import FluxAutoencoder
from diffsynth.models.qwen3 import Qwen3TextEncoder

CATALOG = _discovery.catalog()
ARCHITECTURES = {declared.spec.name: declared.spec for declared in CATALOG.architectures}
CHECKPOINTS = [declared.spec for declared in CATALOG.checkpoints]


@pytest.fixture
def saved(tmp_path):
    torch.manual_seed(0)
    module = FluxAutoencoder(TINY_FLUX_AUTOENCODER)
    file = tmp_path / "vae.safetensors"
    save_checkpoint(module, file, architecture="flux_autoencoder", config=TINY_FLUX_AUTOENCODER)
    return module, file


def load_file_as(tensors, **options):
    (recognized,) = recognize(tensors, ARCHITECTURES, CHECKPOINTS)
    return component.load_component(recognized, tensors, **{"device": "cpu", "dtype": torch.float32} | options)


def test_round_trip_changes_no_bit(saved):
    module, file = saved
    loaded = load_file_as(read_files([file]))
    assert loaded.config == module.config
    state = module.state_dict()
    assert all(torch.equal(tensor, state[name]) for name, tensor in loaded.state_dict().items())
    assert not loaded.training
    assert not any(parameter.requires_grad for parameter in loaded.parameters())


def test_a_saved_file_has_the_usual_mode(saved):
    usual = saved[1].with_name("usual")
    usual.touch()
    assert saved[1].stat().st_mode == usual.stat().st_mode


def test_dtype_is_converted(saved):
    module, file = saved
    loaded = load_file_as(read_files([file]), dtype=torch.bfloat16)
    state = module.state_dict()
    assert all(torch.equal(tensor, state[name].bfloat16()) for name, tensor in loaded.state_dict().items())


def test_loaded_weights_do_not_alias_the_file(saved):
    _, file = saved
    loaded = load_file_as(read_files([file]))
    before = loaded.state_dict()["encoder.conv_in.weight"].clone()
    file.write_bytes(bytes(file.stat().st_size))
    assert torch.equal(loaded.state_dict()["encoder.conv_in.weight"], before)


def test_shards_pickles_and_state_dicts_load_alike(saved, tmp_path):
    _, file = saved
    tensors = load_file(file)
    keys = sorted(tensors)
    parts = [tmp_path / "a.safetensors", tmp_path / "b.safetensors"]
    save_file({key: tensors[key] for key in keys[::2]}, parts[0])
    save_file({key: tensors[key] for key in keys[1::2]}, parts[1])
    torch.save({"state_dict": tensors}, tmp_path / "x.pth")
    for source in (read_files(parts), read_files([tmp_path / "x.pth"]), pickled.of_state_dict(tensors)):
        # Without our metadata norm_groups is not known; the weights are what is under test.
        loaded = load_file_as(source)
        assert all(torch.equal(tensor, tensors[name]) for name, tensor in loaded.state_dict().items())


def test_a_transformers_module_leaves_nothing_on_meta(tmp_path):
    torch.manual_seed(0)
    module = Qwen3TextEncoder(TINY_QWEN3_TEXT_ENCODER).eval()
    save_checkpoint(
        module, tmp_path / "t.safetensors", architecture="qwen3_text_encoder", config=TINY_QWEN3_TEXT_ENCODER
    )
    loaded = load_file_as(read_files([tmp_path / "t.safetensors"]))
    ids = torch.randint(TINY_QWEN3_TEXT_ENCODER.vocab_size, (1, 7))
    with torch.no_grad():
        assert torch.equal(loaded(ids), module(ids))


def rewritten(file, change):
    tensors = load_file(file)
    metadata = read_files([file]).metadata
    change(tensors)
    save_file(tensors, file, metadata=metadata)
    return read_files([file])


def test_missing_unknown_and_misshapen_keys_raise_before_reading(saved, monkeypatch):
    _, file = saved
    monkeypatch.setattr(component.ComponentSource, "read", None)

    def change(tensors):
        tensors["surprise"] = torch.zeros(1)
        tensors["decoder.conv_out.bias"] = torch.zeros(7)
        del tensors["encoder.conv_in.bias"]

    with pytest.raises(KeyMismatch) as caught:
        load_file_as(rewritten(file, change))
    message = str(caught.value)
    assert "1 missing (encoder.conv_in.bias)" in message
    assert "1 unknown (surprise)" in message
    assert "decoder.conv_out.bias is (7,), expected (3,)" in message


def test_unused_keys_of_a_structural_match_are_named(saved, caplog):
    _, file = saved
    tensors = load_file(file) | {"surprise.weight": torch.zeros(1)}
    with caplog.at_level(logging.WARNING):
        load_file_as(pickled.of_state_dict(tensors))
    assert "1 key is not used: surprise.weight" in caplog.text


def test_not_enough_memory_is_found_before_reading(saved, monkeypatch):
    _, file = saved
    monkeypatch.setattr(component.ComponentSource, "read", None)
    monkeypatch.setattr(component.devices, "available_memory", lambda device: 1000)
    with pytest.raises(NotEnoughMemory, match="Nothing was read"):
        load_file_as(read_files([file]))


def test_mapped_weights_take_no_memory_that_has_to_be_free(saved, monkeypatch):
    module, file = saved
    monkeypatch.setattr(component.devices, "available_memory", lambda device: 1000)
    loaded = load_file_as(read_files([file]), copy=False)
    state = module.state_dict()
    assert all(torch.equal(tensor, state[name]) for name, tensor in loaded.state_dict().items())
    with pytest.raises(NotEnoughMemory):
        load_file_as(read_files([file]), copy=False, dtype=torch.bfloat16)


def test_meta_reads_nothing(saved, monkeypatch):
    monkeypatch.setattr(BlockReader, "_read", None)
    loaded = load_file_as(read_files([saved[1]]), device="meta", dtype=torch.bfloat16)
    assert {(tensor.device.type, tensor.dtype) for tensor in loaded.state_dict().values()} == {("meta", torch.bfloat16)}


def test_what_is_written_to_mapped_weights_stays_out_of_the_file(saved):
    _, file = saved
    before = file.read_bytes()
    loaded = load_file_as(read_files([file]), copy=False)
    with torch.no_grad():
        for parameter in loaded.parameters():
            parameter.zero_()
    assert file.read_bytes() == before


def test_the_config_is_in_the_metadata(saved):
    _, file = saved
    import json

    notes = read_files([file]).metadata
    assert notes["diffsynth.architecture"] == "flux_autoencoder"
    assert json.loads(notes["diffsynth.config"]) == json.loads(json.dumps(dataclasses.asdict(TINY_FLUX_AUTOENCODER)))


def test_a_failed_save_leaves_the_old_file(saved, monkeypatch):
    module, file = saved
    before = file.read_bytes()

    def fail(*arguments, **options):
        raise OSError("disk full")

    monkeypatch.setattr("diffsynth.core.loader.save._bytes", fail)
    with pytest.raises(OSError, match="disk full"):
        save_checkpoint(module, file, architecture="flux_autoencoder", config=TINY_FLUX_AUTOENCODER)
    assert file.read_bytes() == before
    assert [path.name for path in file.parent.iterdir()] == [file.name]


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_not_finite(toy, tmp_path, value):
    net = toy.Net(toy.NetConfig())
    with torch.no_grad():
        net.layers[1]["k"].weight[2, 3] = value
    save_file(net.state_dict(), tmp_path / "x.safetensors")
    tensors = read_files([tmp_path / "x.safetensors"])
    (found,) = recognize(tensors, toy.ARCHITECTURES, toy.CHECKPOINTS)
    message = r"x\.safetensors: 1 weight holds NaN or infinity: .*k\.weight"
    with pytest.raises(CorruptFile, match=message):
        component.load_component(found, tensors, device="cpu", dtype=torch.float32)
    module, source = component.open_component(found, tensors, dtype=torch.float32)
    component.materialize(module, source, device="meta")
    component.fill_buffers(module)
    with pytest.raises(CorruptFile, match=message):
        wrap(module, Policy.preset("cpu-offload", "cpu"), source=source)
    module, source = component.open_component(found, tensors, dtype=torch.float32)
    component.materialize(module, source, device="meta")
    component.fill_buffers(module)
    on_disk = wrap(module, Policy.preset("disk", "cpu"), source=source)
    with pytest.raises(CorruptFile, match=message):
        on_disk.enter()
