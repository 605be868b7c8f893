"""Pickles of trainers: weights under any name, beside settings and optimizer states."""

import argparse
import pathlib
import threading
from types import SimpleNamespace

import pytest
import torch

from diffsynth import _discovery
from diffsynth.core.loader import pickled
from diffsynth.core.loader.checkpoint import read_files
from diffsynth.core.loader.component import load_component
from diffsynth.core.loader.recognize import recognize
from diffsynth.core.loader.state_dict import hash_model_file, hash_state_dict_keys, load_state_dict
from diffsynth.errors import CorruptFile, Unrecognized
from diffsynth.models.config import FluxAutoencoderConfig
from diffsynth.models.flux_autoencoder import FluxAutoencoder

OPTIMIZER = {"state": {0: {"exp_avg": torch.ones(3), "step": torch.ones(())}}, "param_groups": [{"lr": 1e-4}]}


def autoencoder():
    return FluxAutoencoder(FluxAutoencoderConfig(block_out_channels=(32,) * 4, layers_per_block=1))


@pytest.fixture(scope="module")
def weights():
    torch.manual_seed(0)
    return autoencoder().state_dict()


def found_in(file):
    return recognize(read_files([file]), *_discovery.catalog().layouts())


@pytest.mark.parametrize(
    "wrappers",
    [
        ["model_state_dict"],
        ["params_ema"],
        ["state_dict"],
        ["anything"],
        ["model", "state_dict"],
        ["a", "net", "module"],
    ],
    ids=".".join,
)
def test_the_name_around_the_weights_does_not_matter(wrappers, weights, tmp_path):
    saved = weights
    for name in reversed(wrappers):
        saved = {name: saved}
    torch.save({"epoch": 3, "optimizer_state_dict": OPTIMIZER, **saved}, tmp_path / "x.pt")
    (one,) = found_in(tmp_path / "x.pt")
    assert one.architecture.name == "flux_autoencoder"
    assert one.prefix == "".join(f"{name}." for name in wrappers)
    module = load_component(one, read_files([tmp_path / "x.pt"]), device="cpu", dtype=torch.float32)
    for key, tensor in module.state_dict().items():
        assert torch.equal(tensor, weights[key]), key


def test_two_sets_of_weights_are_a_question(weights, tmp_path):
    torch.save({"params": weights, "params_ema": weights}, tmp_path / "x.pth")
    message = r"holds a flux_autoencoder twice, as its \['params'\] and its \['params_ema'\]. Choose one: .*state_dict="
    with pytest.raises(Unrecognized, match=message):
        found_in(tmp_path / "x.pth")


class Settings:
    """Settings of a training run, as a script defines them."""

    def __init__(self):
        self.rate = 1e-4


@pytest.mark.parametrize("legacy", [False, True])
def test_objects_of_settings_are_left_out(legacy, tmp_path, monkeypatch):
    monkeypatch.setattr(Settings, "__module__", "__main__")
    monkeypatch.setattr("__main__.Settings", Settings, raising=False)
    kept = {
        "a": torch.arange(3.0),
        "args": argparse.Namespace(lr=1, path=pathlib.PurePosixPath("/x")),
        "more": [Settings(), SimpleNamespace(a=1)],
    }
    before = set(torch.serialization.get_safe_globals())
    torch.save(kept, tmp_path / "x.pt", _use_new_zipfile_serialization=not legacy)
    read = read_files([tmp_path / "x.pt"])
    assert read.shapes == {"a": (3,)}
    assert torch.equal(read.tensors_in_memory["a"], kept["a"])
    assert set(torch.serialization.get_safe_globals()) == before


class Runs:
    """An object that runs a function of its own when it is unpickled."""

    def __init__(self, function, *arguments):
        self.call = function, arguments

    def __reduce__(self):
        return self.call


def test_code_does_not_run_and_the_message_is_ours(tmp_path):
    for function in (print, eval, exec, threading.Thread):
        torch.save({"a": torch.ones(2), "b": Runs(function, "ran")}, tmp_path / "x.pt")
        with pytest.raises(CorruptFile) as caught:
            read_files([tmp_path / "x.pt"])
        text = str(caught.value)
        assert function.__name__ in text
        assert "could run code. Save the tensors alone" in text
        assert "two options" not in text
        assert "add_safe_globals" not in text
        assert "\x1b" not in text


def test_a_whole_module_is_named(tmp_path):
    torch.save(autoencoder(), tmp_path / "x.pt")
    with pytest.raises(
        CorruptFile, match=r"holds an object of diffsynth.models.flux_autoencoder.FluxAutoencoder.*net.state_dict\(\)"
    ):
        read_files([tmp_path / "x.pt"])


def test_the_dict_of_tensors_inside():
    inside = {"a": torch.ones(1)}
    assert pickled.without_wrappers({"epoch": 1, "optimizer": OPTIMIZER, "x": {"y": inside}}) is inside
    both = {"x": inside, "y": inside}
    assert pickled.without_wrappers(both) is both


@pytest.mark.parametrize("value", [3, None, b"x", [torch.ones(1)], "x.pt"])
def test_what_is_no_state_dict_is_refused(value):
    for function in (pickled.of_state_dict, pickled.without_wrappers, hash_state_dict_keys):
        with pytest.raises(TypeError, match="state_dict=.*: expected a dict key -> tensor"):
            function(value)


@pytest.mark.parametrize("value", [3, None, b"x", {}, [3]])
def test_what_is_no_path_is_refused(value):
    for function in (load_state_dict, hash_model_file):
        with pytest.raises(TypeError, match="path=.*: expected a path, or a list of the files of one checkpoint"):
            function(value)


@pytest.mark.parametrize("dtype", [torch.int8, torch.bool, torch.complex64, torch.float8_e8m0fnu, "bfloat16"])
def test_a_dtype_that_holds_no_weights_is_refused(dtype, tmp_path):
    with pytest.raises(TypeError, match="torch_dtype=.*: expected torch.bfloat16, torch.float16 or torch.float32 or a"):
        load_state_dict(tmp_path / "x.pt", dtype)
