import threading

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from diffsynth.compat import load_model as compat_load_model
from diffsynth.compat.load_model import load_model, load_model_with_disk_offload, skip_model_initialization
from diffsynth.compat.vram import AutoWrappedLinear
from diffsynth.core.vram import managed
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
    """A converter is a function of the tensors, or a class whose instances are such functions."""
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
    with pytest.raises(KeyMismatch, match=r"unknown \(linear"):
        load_model(Net, path.with_name("nested.pth"))
    with monkeypatch.context() as patch:
        patch.setattr(compat_load_model, "load_state_dict", lambda *args: pytest.fail("tensors were read"))
        with pytest.raises(KeyMismatch, match=r"linear.weight is \(2, 5\), expected \(2, 3\)"):
            load_model(Net, path)
    state_dict = {"other": torch.ones(1), **net.state_dict()}
    del state_dict["linear.bias"]
    with pytest.raises(KeyMismatch, match=r"1 missing \(linear.bias\); 1 unknown \(other"):
        load_model(Net, path, {"width": 5}, state_dict=state_dict)
    with pytest.raises(NoFiles, match="gone.safetensors"):
        load_model(Net, "gone.safetensors")


def test_buffers_that_no_file_holds(saved):
    path, _ = saved
    assert load_model(FilledNet, path, {"width": 5, "table": True}).table.tolist() == [0, 1, 2, 3]
    with pytest.raises(KeyMismatch, match="buffers that no file holds: table"):
        load_model(Net, path, {"width": 5, "table": True})


HOST = {"offload_device": "cpu", "offload_dtype": torch.float32}
DISK = {f"{state}_{part}": "disk" for state in ("offload", "onload") for part in ("device", "dtype")}


@pytest.mark.parametrize("vram_config", [HOST, DISK], ids=["host", "disk"])
@pytest.mark.parametrize("module_map", [None, {nn.Linear: AutoWrappedLinear}], ids=["blocks", "layers"])
@pytest.mark.parametrize("converter", [None, lambda tensors: {f"{key}": tensor for key, tensor in tensors.items()}])
def test_under_a_policy(saved, vram_config, module_map, converter):
    """The outputs are those of the plain module, wherever the weights are stored."""
    path, net = saved
    x = torch.randn(3, 5)
    found = load_model(
        Net,
        path,
        {"width": 5},
        torch.float32,
        state_dict_converter=converter,
        module_map=module_map,
        vram_config=vram_config,
        vram_limit=1,
    )
    assert found.vram_management_enabled
    assert not found.training
    assert found.norm.num_batches_tracked.item() == 7
    assert found.linear.weight.is_meta == ("disk" in vram_config.values())
    with managed(found):
        assert torch.equal(found.norm(found.linear(x)), net.eval().norm(net.linear(x)))


def test_under_a_policy_from_tensors_and_from_a_pickle(saved):
    path, net = saved
    same_as(
        load_model(Net, None, {"width": 5}, torch.float32, state_dict=net.state_dict(), vram_config=HOST),
        net,
        torch.float32,
    )
    same_as(
        load_model(Net, path.with_suffix(".pth"), {"width": 5}, torch.float32, vram_config=HOST), net, torch.float32
    )
    with pytest.raises(ValueError, match=r"diffsynth convert .*net\.pth -o model\.safetensors"):
        load_model(Net, path.with_suffix(".pth"), {"width": 5}, vram_config=DISK)
    with pytest.raises(ValueError, match="block by block.*offload_device='cpu'"):
        load_model(Net, None, {"width": 5}, state_dict=net.state_dict(), vram_config=DISK)


def test_a_disk_map_reads_what_the_converter_takes(saved, tmp_path, monkeypatch):
    _, net = saved
    save_file(
        {"other": torch.ones(4), **{f"net.{key}": t for key, t in net.state_dict().items()}},
        tmp_path / "all.safetensors",
    )

    def converter(tensors):
        return {key.removeprefix("net."): tensor for key, tensor in tensors.items() if key.startswith("net.")}

    monkeypatch.setattr(compat_load_model, "load_state_dict", lambda *args: pytest.fail("all of it was read"))
    found = load_model(
        Net,
        tmp_path / "all.safetensors",
        {"width": 5},
        torch.float32,
        state_dict_converter=converter,
        use_disk_map=True,
    )
    same_as(found, net, torch.float32)


def test_disk_offload_rounds_weights_to_fp8(saved):
    path, net = saved
    found = load_model_with_disk_offload(Net, path, {"width": 5}, torch.float32)
    assert found.linear.weight.is_meta
    rounded = net.linear.weight.to(torch.float8_e4m3fn).float()
    x = torch.randn(3, 5)
    with managed(found):
        assert torch.equal(found.linear(x), nn.functional.linear(x, rounded, found.linear.bias))


def test_memory_arguments_that_say_nothing_are_refused(saved):
    for settings in ({"module_map": {}}, {"vram_limit": 8.0}):
        with pytest.raises(ValueError, match="without a vram_config"):
            load_model(Net, saved[0], {"width": 5}, **settings)
    with pytest.raises(NotImplementedError, match=r"load_model\(quantize=.*comes with quantization"):
        load_model(Net, saved[0], {"width": 5}, quantize="fp8")
    with pytest.raises(ValueError, match="computation_device='cpu' without computation_dtype"):
        load_model(Net, saved[0], {"width": 5}, torch_dtype=None, vram_config=HOST)


def test_skipping_initialisation_is_a_matter_of_one_thread():
    """DiffSynth-Studio replaced `register_parameter` for all threads: modules built in other threads came out empty."""
    inside, outside = [], []
    with skip_model_initialization():
        inside.append(Net())
        thread = threading.Thread(target=lambda: outside.append(Net()))
        thread.start()
        thread.join()
    assert all(parameter.is_meta for parameter in inside[0].parameters())
    assert not any(parameter.is_meta for parameter in outside[0].parameters())
    assert not any(parameter.is_meta for parameter in Net().parameters())
