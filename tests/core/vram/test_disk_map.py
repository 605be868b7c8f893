"""Tensors of a file by name, through anybody's converter, each read when it is asked for."""

from __future__ import annotations

import pytest
import torch
from einops import rearrange
from safetensors.torch import save_file
from tests.core.vram.networks import tower
from torch import nn

from diffsynth.core import DiskMap
from diffsynth.core.loader.reader import source as reading
from diffsynth.errors import KeyMismatch

TENSORS = {
    "old.qkv": torch.randn(12, 4),
    "old.scale": torch.randn(4, dtype=torch.float64),
    "old.count": torch.arange(3),
    "unused": torch.randn(5),
}


@pytest.fixture
def file(tmp_path):
    save_file(TENSORS, tmp_path / "old.safetensors")
    return tmp_path / "old.safetensors"


def test_it_is_a_mapping_of_the_file(file):
    found = DiskMap(file, "cpu")
    assert set(found) == set(TENSORS)
    assert len(found) == 4
    assert "old.scale" in found
    assert "old.scales" not in found
    assert all(
        torch.equal(tensor, TENSORS[name]) and tensor.dtype == TENSORS[name].dtype for name, tensor in found.items()
    )
    assert found["old.scale"] is not found["old.scale"], "nothing is kept"
    with pytest.raises(KeyError, match="did you mean 'old.scale'"):
        found["old.scales"]
    found.flush_files()


def test_dtype_is_that_of_floating_tensors(file):
    found = DiskMap([file], "cpu", torch_dtype=torch.bfloat16, buffer_size=1)
    assert {name: tensor.dtype for name, tensor in found.items()} == {
        "old.qkv": torch.bfloat16,
        "old.scale": torch.bfloat16,
        "old.count": torch.int64,
        "unused": torch.bfloat16,
    }


def converted(state_dict):
    """Everything that converters do: rename, cut, join, rearrange, convert, compute, add; and leave out."""
    query, key, value = state_dict["old.qkv"].chunk(3, dim=0)
    return {
        "query": query,
        "key_value": torch.cat([key, value], dim=1),
        "heads": rearrange(query, "(n d) c -> n c d", n=2).contiguous(),
        "scale": state_dict["old.scale"],
        "scale_again": state_dict["old.scale"],
        "gate": (state_dict["old.scale"].float() + 1) * torch.tensor([1.0, 2.0, 3.0, 4.0]),
        "bias": torch.zeros(2, 3),
        "constant": CONSTANT,
        **{name.removeprefix("old."): tensor for name, tensor in state_dict.items() if name.endswith("count")},
    }


CONSTANT = torch.arange(6.0)


class Converter:
    def __call__(self, state_dict):
        return converted(state_dict)


@pytest.mark.parametrize("converter", [converted, Converter, Converter()], ids=["function", "class", "instance"])
@pytest.mark.parametrize("kind", [".safetensors", ".pth"])
def test_a_converter_that_changes_tensors(converter, kind, tmp_path):
    """The reference called converters with names for tensors: one that cut a tensor cut a name."""
    file = tmp_path / f"old{kind}"
    (save_file if kind == ".safetensors" else torch.save)(TENSORS, file)
    found, expected = DiskMap(file, "cpu", state_dict_converter=converter), converted(dict(TENSORS))
    assert list(found) == list(expected)
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype
        assert torch.equal(found[name], tensor), name


def test_only_what_is_asked_for_is_read(file, monkeypatch):
    found = DiskMap(file, "cpu", state_dict_converter=converted)
    read = []
    tensor = reading.BlockReader.tensor
    monkeypatch.setattr(reading.BlockReader, "tensor", lambda self, key: read.append(key) or tensor(self, key))
    assert found["gate"].shape == (4,)
    assert read == ["old.scale"]


@pytest.mark.parametrize(
    ("converter", "message"),
    [
        (lambda tensors: {"x": tensors["unused"] if tensors["unused"].sum() > 0 else None}, "cannot be traced for"),
        (lambda tensors: {"x": tensors["unused"].tolist()}, "cannot be traced for"),
        (lambda tensors: {"x": tensors["unused"].mul_(2)}, "writes into a tensor"),
        (lambda tensors: {"x": torch.randn_like(tensors["unused"])}, "random values"),
        (lambda tensors: {"x": "old.qkv"}, "a str for 'x'"),
        (lambda tensors: (tensors, {}), "gave a tuple"),
    ],
)
def test_a_converter_that_needs_values_is_refused(file, converter, message):
    with pytest.raises(ValueError, match=message):
        DiskMap(file, "cpu", state_dict_converter=converter)


def test_a_name_that_the_file_lacks(file):
    with pytest.raises(KeyMismatch, match="no 'new.qkv', which the state_dict_converter wants"):
        DiskMap(file, "cpu", state_dict_converter=lambda tensors: {"x": tensors["new.qkv"]})


def test_the_source_of_a_module_under_a_prefix(tmp_path):
    module = tower()
    save_file({f"net.{name}": p.clone() for name, p in module.named_parameters()}, tmp_path / "net.safetensors")
    found = DiskMap(tmp_path / "net.safetensors", "cpu")
    source = found.source_of(module, "net.")
    assert set(source.keys) == {name for name, _ in module.named_parameters()}
    assert torch.equal(source.read(["start"])["start"], module.start)
    with pytest.raises(KeyMismatch, match=r"36 missing \(.*embed.weight.* and 28 more"):
        found.source_of(module)
    module.start = nn.Parameter(torch.zeros(3))
    with pytest.raises(KeyMismatch, match=r"net.start is \(32,\), expected \(3,\)"):
        found.source_of(module, "net.")
    with torch.device("meta"):
        module.register_buffer("table", torch.zeros(3), persistent=False)
    with pytest.raises(KeyMismatch, match="no file holds: table"):
        found.source_of(module, "net.")


def test_a_tied_weight_has_any_of_its_names(tmp_path):
    module = tower()
    tensors = dict(module.state_dict())
    del tensors["embed.weight"]
    save_file(tensors, tmp_path / "net.safetensors")
    source = DiskMap(tmp_path / "net.safetensors", "cpu").source_of(module)
    assert torch.equal(source.read(["embed.weight"])["embed.weight"], module.head.weight)
