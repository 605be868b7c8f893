import hashlib
import logging

import pytest
import torch
from safetensors.torch import save_file

from diffsynth.core.loader.header import signature
from diffsynth.core.loader.state_dict import (
    hash_model_file,
    hash_state_dict_keys,
    load_keys_dict,
    load_metadata_from_safetensors,
    load_state_dict,
    load_state_dict_from_bin,
    load_state_dict_from_safetensors,
)
from diffsynth.errors import CorruptFile, KeyMismatch, NoFiles

TENSORS = {"b.weight": torch.randn(2, 3), "a": torch.arange(4), "half": torch.randn(5).bfloat16()}
NESTED = {"model": {"x": torch.randn(2), "deep": {"y": torch.randn(1, 3)}}, "z": torch.randn(4)}
SHAPES = {"b.weight": (2, 3), "a": (4,), "half": (5,)}


@pytest.fixture
def files(tmp_path):
    save_file(TENSORS, tmp_path / "a.safetensors", metadata={"format": "pt", "note": "Äpfel"})
    save_file({"c": torch.ones(1)}, tmp_path / "c.safetensors")
    torch.save(TENSORS, tmp_path / "a.pth")
    torch.save({"state_dict": TENSORS}, tmp_path / "wrapped.bin")
    torch.save(NESTED, tmp_path / "nested.pt")
    return tmp_path


def same(found, expected):
    assert found.keys() == expected.keys()
    for key, tensor in expected.items():
        if isinstance(tensor, dict):
            same(found[key], tensor)
        else:
            assert found[key].dtype == tensor.dtype
            assert torch.equal(found[key], tensor)


@pytest.mark.parametrize("name", ["a.safetensors", "a.pth", "wrapped.bin"])
def test_tensors_as_they_were_saved(files, name):
    same(load_state_dict(str(files / name)), TENSORS)
    load = load_state_dict_from_safetensors if name.endswith("safetensors") else load_state_dict_from_bin
    same(load(files / name), TENSORS)


@pytest.mark.parametrize("name", ["a.safetensors", "a.pth"])
def test_dtype_is_that_of_floating_tensors(files, name):
    found = load_state_dict(files / name, torch_dtype=torch.float16)
    assert {key: tensor.dtype for key, tensor in found.items()} == {
        "b.weight": torch.float16,
        "a": torch.int64,
        "half": torch.float16,
    }
    assert torch.equal(found["half"], TENSORS["half"].half())
    assert load_state_dict(files / name, device="meta")["a"].is_meta


def test_several_files_are_one_checkpoint(files, caplog):
    with caplog.at_level(logging.INFO):
        found = load_state_dict([files / "a.safetensors", files / "c.safetensors"], verbose=1)
    same(found, {**TENSORS, "c": torch.ones(1)})
    assert [record.message.rpartition("/")[2] for record in caplog.records] == ["a.safetensors", "c.safetensors"]


def test_two_checkpoints_are_not_one(files):
    """The second of two LoRAs with equal keys took the place of the first, without a word."""
    with pytest.raises(KeyMismatch, match=r"'a' is in .*a\.safetensors and in a file before it"):
        load_state_dict([files / "a.safetensors", files / "a.safetensors"])


def test_a_nested_pickle_stays_nested(files):
    same(load_state_dict(files / "nested.pt"), NESTED)
    assert load_keys_dict(files / "nested.pt") == {"model": {"x": (2,), "deep": {"y": (1, 3)}}, "z": (4,)}


def test_tensors_do_not_change_with_the_file(files):
    found = load_state_dict(files / "a.pth")
    with (files / "a.pth").open("r+b") as file:
        file.write(bytes((files / "a.pth").stat().st_size))
    same(found, TENSORS)


def test_keys_and_metadata(files):
    assert load_keys_dict(files / "a.safetensors") == SHAPES
    assert load_keys_dict([files / "a.safetensors", files / "c.safetensors"]) == {**SHAPES, "c": (1,)}
    assert load_metadata_from_safetensors(files / "a.safetensors") == {"format": "pt", "note": "Äpfel"}
    assert load_metadata_from_safetensors(files / "c.safetensors") == {}


def test_hashes_are_the_published_kind(files):
    text = "a,a:4,b.weight,b.weight:2_3,half,half:5"
    expected = hashlib.md5(text.encode()).hexdigest()
    assert hash_model_file(files / "a.safetensors") == hash_model_file(files / "wrapped.bin") == expected
    assert hash_state_dict_keys(TENSORS) == signature(SHAPES) == expected
    names = hashlib.md5(b"a,b.weight,half").hexdigest()
    assert hash_model_file(str(files / "a.pth"), with_shape=False) == names
    assert hash_state_dict_keys(TENSORS, with_shape=False) == names


def test_hashes_of_nested_dicts(files):
    text = "model|deep|y,y:1_3,x,x:2,z,z:4"
    expected = hashlib.md5(text.encode()).hexdigest()
    assert hash_model_file(files / "nested.pt") == hash_state_dict_keys(NESTED) == expected
    assert hash_model_file(files / "nested.pt", with_shape=False) == hashlib.md5(b"model|deep|y,x,z").hexdigest()


def test_a_hash_of_several_files_is_that_of_all_keys(files):
    both = [files / "a.safetensors", files / "c.safetensors"]
    assert hash_model_file(both) == signature({**SHAPES, "c": (1,)})


@pytest.mark.parametrize("load", [load_state_dict, load_keys_dict, hash_model_file, load_metadata_from_safetensors])
def test_no_file_and_no_checkpoint(files, load):
    with pytest.raises(NoFiles, match="gone.safetensors"):
        load(files / "gone.safetensors")
    (files / "text.safetensors").write_text("this is some text and no checkpoint")
    with pytest.raises(CorruptFile, match="text.safetensors"):
        load(files / "text.safetensors")
