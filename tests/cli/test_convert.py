"""Tests of `diffsynth convert`: all formats of the loader, and no overwritten or incomplete files."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import load_file, save_file

import diffsynth
from diffsynth.cli.group import program
from diffsynth.core.loader import header, save
from diffsynth.core.loader.checkpoint import read_files
from diffsynth.testing import tiny_hub

TENSORS = {"a": torch.randn(3, 4).t(), "b": torch.arange(5), "c": torch.randn(2, dtype=torch.float64)}


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


def run(*arguments):
    return CliRunner().invoke(program, ["convert", *map(str, arguments)])


def equal(found, expected):
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[key], expected[key]) and found[key].dtype == expected[key].dtype for key in expected)


@pytest.mark.parametrize("wrapped", [TENSORS, {"state_dict": TENSORS}])
def test_a_pickle(wrapped):
    torch.save(wrapped, "old.pth")
    result = run("old.pth", "-o", "new.safetensors")
    assert (result.exit_code, result.stdout) == (0, "new.safetensors\n"), result.output
    equal(load_file("new.safetensors"), TENSORS)


def test_nested_names_are_joined(folder):
    torch.save({"net": {"a": torch.ones(2)}, "b": torch.zeros(1)}, "old.pt")
    assert run("old.pt", "-o", "new.safetensors").exit_code == 0
    equal(load_file("new.safetensors"), {"net.a": torch.ones(2), "b": torch.zeros(1)})


def test_dtype_is_that_of_floating_tensors():
    torch.save(TENSORS, "old.pth")
    assert run("old.pth", "-o", "new.safetensors", "--dtype", "bfloat16").exit_code == 0
    equal(
        load_file("new.safetensors"), {key: t.bfloat16() if t.is_floating_point() else t for key, t in TENSORS.items()}
    )


@pytest.mark.parametrize(
    "given", [["m-00001-of-00002.safetensors"], ["."], ["m-00001-of-00002.safetensors", "m-00002-of-00002.safetensors"]]
)
def test_shards(given, folder):
    (folder / "out").mkdir()
    save_file({"a": torch.ones(3)}, "m-00001-of-00002.safetensors", {"note": "kept"})
    save_file({"b": torch.zeros(2)}, "m-00002-of-00002.safetensors", {"note": "kept"})
    assert run(*given, "-o", "out/new.safetensors").exit_code == 0
    equal(load_file("out/new.safetensors"), {"a": torch.ones(3), "b": torch.zeros(2)})
    assert header.read_safetensors(folder / "out/new.safetensors").metadata == {"note": "kept", "format": "pt"}


def test_own_names_and_what_the_policy_disk_asks_for(folder):
    """The command that the policy's error message names writes a file that the policy accepts."""
    tiny_hub(folder / "hub", "z-image-turbo")
    pipe = diffsynth.load("z-image-turbo", device="cpu", torch_dtype=torch.float32, base_path=folder / "hub")
    own = {f"model.diffusion_model.{key}": tensor for key, tensor in pipe.dit.state_dict().items()}
    torch.save(own, "dit.pth")
    result = run("dit.pth", "-o", "dit.safetensors", "--own-names", "--dtype", "float32")
    assert result.exit_code == 0, result.output
    equal(load_file("dit.safetensors"), dict(pipe.dit.state_dict()))
    (answer,) = json.loads(CliRunner().invoke(program, ["recognize", "dit.safetensors", "--json"]).stdout)
    assert answer["components"][0]["tier"] == "metadata"
    assert read_files([folder / "dit.safetensors"]).metadata[save.BASE_KEY] == header.signature(
        read_files([folder / "dit.pth"]).shapes
    )


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["old.pth", "-o", "new.pth"], "ends in .safetensors"),
        (["old.pth", "-o", "no/where/new.safetensors"], "there is no folder"),
        (["old.pth", "-o", "there.safetensors"], "there.safetensors exists"),
        (["gone.pth", "-o", "new.safetensors"], "gone.pth"),
        (["old.pth", "-o", "new.safetensors", "--own-names"], "needs a --dtype"),
        (["old.pth", "-o", "new.safetensors", "--own-names", "--dtype", "float32"], "Unrecognized"),
    ],
)
def test_what_is_refused(arguments, message, folder):
    torch.save(TENSORS, "old.pth")
    save_file({"kept": torch.ones(1)}, "there.safetensors")
    result = run(*arguments)
    assert result.exit_code == 2, result.output
    assert message in result.stderr
    assert sorted(path.name for path in folder.iterdir()) == ["old.pth", "there.safetensors"]
    equal(load_file("there.safetensors"), {"kept": torch.ones(1)})


def test_no_room(monkeypatch):
    torch.save(TENSORS, "old.pth")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10, 5, 5))
    assert "GiB free" in run("old.pth", "-o", "new.safetensors").stderr


def test_nothing_is_left_of_a_conversion_that_fails(monkeypatch, folder):
    torch.save(TENSORS, "old.pth")
    monkeypatch.setattr(save, "_bytes", lambda key, entry: 1 / 0)
    assert isinstance(run("old.pth", "-o", "new.safetensors").exception, ZeroDivisionError)
    assert [path.name for path in folder.iterdir()] == ["old.pth"]
