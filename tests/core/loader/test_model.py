import threading

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from diffsynth.core.loader import model
from diffsynth.core.loader.model import load_model, skip_model_initialization
from diffsynth.errors import KeyMismatch, NoFiles


class Net(nn.Module):
    def __init__(self, width=3, table=False):
        super().__init__()
        self.linear = nn.Linear(width, 2)
        self.norm = nn.BatchNorm1d(2)
        if table:
            self.register_buffer("table", torch.arange(4.0), persistent=False)


class FilledNet(Net):
    def reset_buffers(self):
        self.table = torch.arange(4.0)


@pytest.fixture
def saved(tmp_path):
    net = Net(width=5)
    net.norm.num_batches_tracked += 7
    save_file(net.state_dict(), tmp_path / "net.safetensors")
    torch.save({"state_dict": net.state_dict()}, tmp_path / "net.pth")
    return tmp_path / "net.safetensors", net


def same_as(found, net, dtype):
    for (name, tensor), truth in zip(found.state_dict().items(), net.state_dict().values(), strict=True):
        assert tensor.dtype == (dtype if truth.is_floating_point() else truth.dtype), name
        assert torch.equal(tensor, truth.to(tensor.dtype)), name


@pytest.mark.parametrize("suffix", [".safetensors", ".pth"])
def test_loads(saved, suffix):
    path, net = saved
    found = load_model(Net, str(path.with_suffix(suffix)), {"width": 5})
    assert type(found) is Net
    assert not found.training
    same_as(found, net, torch.bfloat16)
    same_as(load_model(Net, path, {"width": 5}, torch_dtype=None), net, torch.float32)


def test_from_tensors(saved):
    _, net = saved
    found = load_model(Net, None, {"width": 5}, torch.float32, state_dict=net.state_dict())
    same_as(found, net, torch.float32)
    with pytest.raises(ValueError, match="neither a path nor a state_dict"):
        load_model(Net, None)


def test_converters(saved, tmp_path):
    """A function of the tensors, or, as older code has it, a class whose instances are."""
    _, net = saved
    renamed = {f"old.{key}": tensor for key, tensor in net.state_dict().items()}
    save_file(renamed, tmp_path / "old.safetensors")

    def convert(state_dict):
        return {key.removeprefix("old."): tensor for key, tensor in state_dict.items()}

    class Converter:
        def __call__(self, state_dict):
            return convert(state_dict)

    for converter in (convert, Converter, Converter()):
        found = load_model(
            Net, tmp_path / "old.safetensors", {"width": 5}, torch.float32, state_dict_converter=converter
        )
        same_as(found, net, torch.float32)


def test_misfits_are_told_before_anything_is_read(saved, monkeypatch):
    path, net = saved
    torch.save({"linear": {"weight": torch.ones(2, 3)}, "norm": {}}, path.with_name("nested.pth"))
    with pytest.raises(KeyMismatch, match="has beyond that linear"):
        load_model(Net, path.with_name("nested.pth"))
    with monkeypatch.context() as patch:
        patch.setattr(model, "load_state_dict", lambda *args: pytest.fail("tensors were read"))
        with pytest.raises(KeyMismatch, match=r"linear.weight \(2, 5\) for \(2, 3\)"):
            load_model(Net, path)
    state_dict = {"other": torch.ones(1), **net.state_dict()}
    del state_dict["linear.bias"]
    with pytest.raises(KeyMismatch, match="it lacks linear.bias; it has beyond that other"):
        load_model(Net, path, {"width": 5}, state_dict=state_dict)
    with pytest.raises(NoFiles, match="gone.safetensors"):
        load_model(Net, "gone.safetensors")


def test_buffers_that_no_file_holds(saved):
    path, _ = saved
    assert load_model(FilledNet, path, {"width": 5, "table": True}).table.tolist() == [0, 1, 2, 3]
    with pytest.raises(KeyMismatch, match="buffers that no file holds: table"):
        load_model(Net, path, {"width": 5, "table": True})


@pytest.mark.parametrize(
    ("settings", "part"),
    [
        ({"use_disk_map": True}, "the VRAM engine"),
        ({"module_map": {}}, "the VRAM engine"),
        ({"vram_config": {}}, "the VRAM engine"),
        ({"vram_limit": 8.0}, "the VRAM engine"),
        ({"quantize": "fp8"}, "quantization"),
    ],
)
def test_what_comes_later_is_refused(saved, settings, part):
    (name,) = settings
    with pytest.raises(NotImplementedError, match=f"load_model\\({name}=.*comes with {part}"):
        load_model(Net, saved[0], {"width": 5}, **settings)
    load_model(Net, saved[0], {"width": 5}, use_disk_map=False, vram_limit=None)


def test_skipping_initialisation_is_a_matter_of_one_thread():
    """The reference program replaced `register_parameter` for all: other threads' modules came out empty."""
    inside, outside = [], []
    with skip_model_initialization():
        inside.append(Net())
        thread = threading.Thread(target=lambda: outside.append(Net()))
        thread.start()
        thread.join()
    assert all(parameter.is_meta for parameter in inside[0].parameters())
    assert not any(parameter.is_meta for parameter in outside[0].parameters())
    assert not any(parameter.is_meta for parameter in Net().parameters())
