"""`save_checkpoint` writes files atomically, and every reader reads them back."""

import json
import os

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from diffsynth import _discovery
from diffsynth.core.loader import component, files, header, save
from diffsynth.core.loader.config import ModelConfig
from diffsynth.core.loader.convert import (
    Apply,
    Constant,
    Dequantize,
    Drop,
    Fuse,
    Permute,
    Rename,
    ReorderChunks,
    Reshape,
    Split,
    Tie,
)
from diffsynth.core.loader.dtypes import dtype_names
from diffsynth.core.loader.files import checkpoint_at
from diffsynth.core.loader.recognize import recognize
from diffsynth.core.loader.save import save_checkpoint
from diffsynth.core.lora import add_hot, clear_hot, fit, parse
from diffsynth.errors import KeyMismatch
from diffsynth.spec import CheckpointSpec
from killed import killed_at_every_write


@pytest.fixture
def net(toy):
    return toy.Net(toy.NetConfig())


def store(net, path, **options):
    return save_checkpoint(net, path, architecture="net", config=net.config, **options)


def load_back(toy, paths, checkpoints=None, dtype=torch.float32):
    tensors = header.read(paths)
    (found,) = recognize(tensors, toy.ARCHITECTURES, checkpoints or toy.CHECKPOINTS)
    return found, component.load_component(found, tensors, device="cpu", dtype=dtype)


def same(one, other):
    theirs = other.state_dict()
    return all(torch.equal(value, theirs[name]) for name, value in one.state_dict().items())


class Everything(nn.Module):
    """A module with a buffer of every dtype, one without elements, a scalar, and one whose name is not ASCII."""

    def __init__(self):
        super().__init__()
        for dtype in dtype_names():
            self.register_buffer(str(dtype).replace(".", "_"), torch.arange(6).to(torch.float32).to(dtype))
        self.register_buffer("empty", torch.zeros(0, 4))
        self.register_buffer("scalar", torch.tensor(2.5))
        self.register_buffer("größe_重み", torch.ones(3, 2).T)


def test_the_official_reader_reads_it(toy, tmp_path):
    module = Everything()
    save_checkpoint(module, tmp_path / "x.safetensors", architecture="net", config=toy.NetConfig())
    read = load_file(tmp_path / "x.safetensors")
    for name, tensor in module.state_dict().items():
        assert read[name].dtype == tensor.dtype
        assert read[name].shape == tensor.shape
        assert torch.equal(*(each.contiguous().reshape(-1).view(torch.uint8) for each in (read[name], tensor))), name
    assert header.read([tmp_path / "x.safetensors"]).shapes == {k: tuple(t.shape) for k, t in read.items()}


def test_tensors_are_aligned_to_their_items(toy, tmp_path):
    save_checkpoint(Everything(), tmp_path / "x.safetensors", architecture="net", config=toy.NetConfig())
    infos = header.read([tmp_path / "x.safetensors"]).tensors
    widths = {name: dtype.itemsize for dtype, name in dtype_names().items()}
    assert all(info.start % widths[info.dtype] == 0 for info in infos.values())


def test_metadata(net, tmp_path):
    store(net, tmp_path / "x.safetensors", metadata={"note": "mine"}, base="ab" * 16)
    notes = header.read([tmp_path / "x.safetensors"]).metadata
    assert notes["note"] == "mine"
    assert notes["diffsynth.base"] == "ab" * 16
    assert json.loads(notes["diffsynth.versions"]).keys() == {"diffsynth-core", "torch", "safetensors"}
    assert json.loads(notes["diffsynth.config"]) == {"width": 4, "layers": 2}


def test_the_same_weights_make_the_same_file(net, tmp_path):
    store(net, tmp_path / "a.safetensors")
    store(net, tmp_path / "b.safetensors")
    assert (tmp_path / "a.safetensors").read_bytes() == (tmp_path / "b.safetensors").read_bytes()


def test_shards_with_an_index(toy, net, tmp_path):
    paths = store(net, tmp_path / "x.safetensors", shard_size=200)
    assert [path.name for path in paths] == [
        f"x-{i:05d}-of-{len(paths):05d}.safetensors" for i in range(1, 1 + len(paths))
    ]
    assert len(paths) > 1
    index = json.loads((tmp_path / "x.safetensors.index.json").read_text())
    assert set(index["weight_map"]) == set(net.state_dict())
    assert index["metadata"]["total_size"] == sum(t.numel() * t.element_size() for t in net.state_dict().values())
    for source in (tmp_path, tmp_path / "x.safetensors.index.json", paths):
        found, module = load_back(toy, files.find(ModelConfig(source)))
        assert found.tier == "metadata"
        assert same(module, net)
    for path in paths:
        assert set(load_file(path)) == {key for key, file in index["weight_map"].items() if file == path.name}


def test_fewer_files_leave_none_of_the_earlier_behind(toy, net, tmp_path):
    store(net, tmp_path / "x.safetensors", shard_size=200)
    (tmp_path / "x-00001-of-00002.safetensors").write_bytes(b"somebody else's")
    store(net, tmp_path / "x.safetensors")
    assert {path.name for path in tmp_path.iterdir()} == {"x.safetensors", "x-00001-of-00002.safetensors"}
    (tmp_path / "x-00001-of-00002.safetensors").unlink()
    paths = store(net, tmp_path / "x.safetensors", shard_size=200)
    assert {path.name for path in tmp_path.iterdir()} == {path.name for path in paths} | {"x.safetensors.index.json"}
    assert same(load_back(toy, [tmp_path])[1], net)


@pytest.mark.parametrize("shard_size", [10**9, 200])
def test_saving_over_the_file_that_the_weights_come_from(toy, net, tmp_path, shard_size):
    """Loaded weights may map the file itself: writing must not change tensors that are still to be written."""
    paths = store(net, tmp_path / "x.safetensors", shard_size=shard_size)
    _, module = load_back(toy, paths)
    with torch.no_grad():
        module.norm.weight.add_(1)
    wanted = {name: value.clone() for name, value in module.state_dict().items()}
    paths = store(module, tmp_path / "x.safetensors", shard_size=shard_size)
    assert all(torch.equal(value, wanted[name]) for name, value in module.state_dict().items())
    assert same(load_back(toy, paths)[1], module)


def test_shards_of_two_saves_are_told_apart(net, tmp_path):
    """A crash between two renames once left half of each save under one index, without an error when it was read."""
    paths = store(net, tmp_path / "x.safetensors", shard_size=200)
    first = paths[0].read_bytes()
    paths = store(net, tmp_path / "x.safetensors", shard_size=200)
    paths[0].write_bytes(first)
    with pytest.raises(KeyMismatch, match=r"saved with diffsynth\.save=.*not parts of one checkpoint"):
        header.read(paths)


@pytest.mark.parametrize(("before", "after"), [(300, 300), (300, 10**9), (10**9, 300)])
def test_a_save_that_is_killed_leaves_the_old_checkpoint_or_the_new_one(toy, net, tmp_path, before, after):
    """A kill between two renames once left shards of two saves under one index, and neither could be loaded."""
    path = tmp_path / "x.safetensors"
    old = float(net.norm.weight[0].detach())
    store(net, path, shard_size=before)
    with torch.no_grad():
        net.norm.weight.add_(1)
    for _ in killed_at_every_write(lambda: store(net, path, shard_size=after)):
        entry = path if path.exists() else tmp_path / "x.safetensors.index.json"
        found = float(load_back(toy, checkpoint_at(entry))[1].norm.weight[0])
        assert found in (old, old + 1)
    assert found == old + 1
    written = store(net, path, shard_size=after)
    index = ["x.safetensors.index.json"] if written != [path] else []
    assert sorted(file.name for file in tmp_path.iterdir()) == sorted([file.name for file in written] + index)


@pytest.mark.parametrize("shard_size", [10**9, 200])
@pytest.mark.parametrize("step", ["_bytes", "os.fsync", "os.replace"])
def test_a_save_that_fails_changes_nothing(net, tmp_path, monkeypatch, step, shard_size):
    store(net, tmp_path / "x.safetensors", shard_size=shard_size)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}

    def fail(*arguments):
        raise OSError(28, "No space left on device")

    with torch.no_grad():
        net.norm.weight.add_(1)
    with monkeypatch.context() as patch:
        patch.setattr(f"diffsynth.core.loader.save.{step}" if step == "_bytes" else step, fail)
        with pytest.raises(OSError, match="No space left"):
            store(net, tmp_path / "x.safetensors", shard_size=shard_size)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_file_and_folder_reach_the_disk_before_anything_is_said_to_be_saved(net, tmp_path, monkeypatch):
    order = []
    fsync, replace = os.fsync, os.replace
    monkeypatch.setattr("os.fsync", lambda fd: (order.append(os.readlink(f"/proc/self/fd/{fd}")), fsync(fd)))
    monkeypatch.setattr("os.replace", lambda a, b: (order.append("rename"), replace(a, b)))
    store(net, tmp_path / "x.safetensors")
    assert [".partial" in entry for entry in order] == [True, False, False]
    assert order[1:] == ["rename", str(tmp_path)]


def test_memory_needed_is_one_tensor(toy, tmp_path, monkeypatch):
    """Tensors are converted one by one while they are written."""
    module = toy.Net(toy.NetConfig(layers=20))
    alive, peak = [], []
    make = save._bytes

    def spy(key, entry):
        alive.append(make(key, entry))
        peak.append(key)
        return alive.pop()

    monkeypatch.setattr(save, "_bytes", spy)
    save_checkpoint(module, tmp_path / "x.safetensors", architecture="net", config=module.config, dtype=torch.bfloat16)
    assert len(peak) == len(module.state_dict())
    assert all(info.dtype != "F32" for info in header.read([tmp_path / "x.safetensors"]).tensors.values())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"metadata": {"diffsynth.layout": "x"}}, "which save_checkpoint writes itself"),
        ({"metadata": {"step": 3}}, r"metadata\['step'\] is 3; expected text"),
        ({"shard_size": 0}, "shard_size=0: expected bytes"),
        ({"layout": "no/such"}, "layout='no/such': net has the layouts none"),
    ],
)
def test_bad_arguments(net, tmp_path, options, message):
    with pytest.raises(ValueError, match=message):
        store(net, tmp_path / "x.safetensors", **options)
    assert list(tmp_path.iterdir()) == []


def test_a_hot_lora_is_not_in_the_weights(net, tmp_path):
    name, layer = next((name, each) for name, each in net.named_modules() if isinstance(each, nn.Linear))
    pair = {"lora_A": torch.ones(1, layer.in_features), "lora_B": torch.ones(layer.out_features, 1)}
    add_hot(net, fit(parse({f"{name}.{side}.weight": tensor for side, tensor in pair.items()}), net))
    with pytest.raises(ValueError, match=rf"{name} of Net has a hot LoRA \(load it with hotload=False, or remove"):
        store(net, tmp_path / "x.safetensors")
    assert list(tmp_path.iterdir()) == []
    clear_hot(net)
    store(net, tmp_path / "x.safetensors")


def test_a_dtype_that_the_format_does_not_have(net, tmp_path):
    net.register_buffer("wave", torch.zeros(2, dtype=torch.complex128))
    with pytest.raises(ValueError, match=r"wave is torch\.complex128, which safetensors does not have"):
        store(net, tmp_path / "x.safetensors")


# Published layouts, by the inverse of their rules.

PUBLISHED = {
    "rename": ((Rename("final_norm.{*}", "norm.{*}"),), {}),
    "split": ((Split("blocks.{n}.qkv", tuple(f"layers.{{n}}.{part}.weight" for part in "qkv")),), {}),
    "fuse": (
        (Fuse(("norm.low", "norm.high"), "norm.weight"),),
        {"norm.low": (1,), "norm.high": (3,)},
    ),
    "reshape": (
        (Reshape("conv.{n}.q", "layers.{n}.q.weight", (4, 4)),),
        {"conv.0.q": (4, 4, 1, 1), "conv.1.q": (4, 4, 1, 1)},
    ),
    "permute": ((Permute("transposed.{n}", "layers.{n}.q.weight", (1, 0)),), {}),
    "reorder": ((ReorderChunks("layers.{n}.turned", "layers.{n}.k.weight", (1, 0)),), {}),
    "tie": ((Tie("layers.0.q.weight", "layers.1.q.weight"),), {}),
    "constant": ((Constant("norm.bias", (4,), 0.0),), {}),
    "drop": ((Drop("rotary.table"),), {}),
}  # fmt: skip


def published(toy, monkeypatch, rules, shapes):
    monkeypatch.setattr(toy, "RULES", rules, raising=False)
    monkeypatch.setattr(save, "layout_of", lambda checkpoint: shapes)
    return CheckpointSpec(name="net/published", architecture="net", rules="toy_loader:RULES")


@pytest.mark.parametrize("op", PUBLISHED)
def test_every_rule_that_has_an_inverse_is_undone(toy, net, tmp_path, monkeypatch, op):
    rules, shapes = PUBLISHED[op]
    layout = published(toy, monkeypatch, rules, shapes)
    if op == "tie":
        net.layers[1]["q"].weight = net.layers[0]["q"].weight
    paths = store(net, tmp_path / "x.safetensors", layout=layout)
    written = header.read(paths)
    assert set(written.shapes) != set(net.state_dict()) or op in ("drop",)
    assert {key: written.shapes[key] for key in shapes} == shapes
    # By our metadata, and without it by the rules alone, as any other program's file.
    found, module = load_back(toy, paths, checkpoints=[layout])
    assert (found.tier, found.checkpoint.name) == ("metadata", "net/published")
    assert same(module, net)
    bare = header.Header(written.tensors, {}, written.files, stamps=written.stamps)
    (found,) = recognize(bare, toy.ARCHITECTURES, [layout])
    assert same(component.load_component(found, bare, device="cpu", dtype=torch.float32), net)


@pytest.mark.parametrize(
    ("rules", "shapes", "message"),
    [
        ((Dequantize("w", "w_scale", "norm.weight"),), {}, "Dequantize of w, w_scale cannot be undone"),
        ((Apply(torch.neg, ("w",), "norm.weight", lambda a: a),), {}, "Apply of w cannot be undone"),
        ((Drop("head.weight"),), {"head.weight": (2,)}, "holds head.weight, which the network does not keep"),
        ((Fuse(("low", "high"), "norm.weight"),), {}, "sizes of low, high cannot be told from norm.weight"),
        ((Reshape("flat", "norm.weight", (2, 2)),), {}, "shape of flat cannot be told"),
        ((Constant("norm.bias", (4,), 1.0),), {}, "leaves out norm.bias, which is no longer 1.0"),
    ],
)
def test_a_rule_without_an_inverse_is_said_before_anything_is_written(
    toy, net, tmp_path, monkeypatch, rules, shapes, message
):
    layout = published(toy, monkeypatch, rules, shapes)
    with pytest.raises(ValueError, match=f"cannot save in layout net/published: .*{message}"):
        store(net, tmp_path / "x.safetensors", layout=layout)
    assert list(tmp_path.iterdir()) == []


def test_tied_weights_that_came_apart(toy, net, tmp_path, monkeypatch):
    layout = published(toy, monkeypatch, *PUBLISHED["tie"])
    with pytest.raises(ValueError, match="keeps as one are no longer equal"):
        store(net, tmp_path / "x.safetensors", layout=layout)
    assert list(tmp_path.iterdir()) == []


def test_a_layout_of_another_architecture(toy, net, tmp_path):
    with pytest.raises(ValueError, match="layout head/parts is one of head, the module is a net"):
        store(net, tmp_path / "x.safetensors", layout=toy.CHECKPOINTS[3])


def test_a_layout_that_is_not_installed_any_more_is_told_by_its_names(toy, net, tmp_path):
    paths = store(net, tmp_path / "x.safetensors", layout=toy.CHECKPOINTS[1])
    renamed = [CheckpointSpec(name="net/other", architecture="net", rules="toy_loader:FUSED")]
    found, module = load_back(toy, paths, checkpoints=renamed)
    assert (found.tier, found.checkpoint.name) == ("structure", "net/other")
    assert same(module, net)


ARCHITECTURES, CHECKPOINTS = _discovery.catalog().layouts()
INSTALLED = [
    one for one in CHECKPOINTS if one.rules and not one.loras_only and not ARCHITECTURES[one.architecture].not_runnable
]
NOT_KEPT = r"holds [\w.]+, which the network does not keep"
REFUSED = {
    "qwen3_text_encoder/with_head": r"holds lm_head\.weight, which the network does not keep",
    # The file holds two networks, and each of them knows its own half.
    **dict.fromkeys(("wan_dit/vace_1.3b", "wan_vace/vace_1.3b", "wan_dit/vace_14b", "wan_vace/vace_14b"), NOT_KEPT),
    **dict.fromkeys(("wan_dit/animate_14b", "wan_animate_adapter/animate_14b"), NOT_KEPT),
    "wan_image_encoder": NOT_KEPT,
    "wan_image_encoder/transformers": r"Apply of [\w.]+ cannot be undone",
    "wan_animate_adapter/diffusers": r"the shape of [\w.]+ cannot be told from",
    # The published files have no single blocks, or are not known, and the tiny network has such blocks.
    **dict.fromkeys(
        (f"flux_controlnet/{name}" for name in ("inpainting", "depth", "upscaler")),
        r"the sizes of .+ cannot be told from",
    ),
    "siglip_image_encoder/with_text_encoder": NOT_KEPT,
    "dinov3_image_encoder": NOT_KEPT,
    "flux2_autoencoder/original": r"the shape of [\w.]+ cannot be told from",
    "mistral_text_encoder": NOT_KEPT,
    "qwen2.5_vl_text_encoder": NOT_KEPT,
    "siglip2_naflex_image_encoder": NOT_KEPT,
}


@pytest.mark.parametrize("checkpoint", INSTALLED, ids=lambda one: one.name)
def test_tiny_models_in_every_installed_layout(checkpoint, tmp_path):
    """Each layout is read back to the bit, or the error names the key that prevents it."""
    architecture = ARCHITECTURES[checkpoint.architecture]
    config = component.resolve(architecture.tiny)
    module = component.resolve(architecture.module)(config)
    arguments = {"architecture": architecture.name, "config": config, "layout": checkpoint.name}
    if checkpoint.name in REFUSED:
        with pytest.raises(ValueError, match=REFUSED[checkpoint.name]):
            save_checkpoint(module, tmp_path / "x.safetensors", **arguments)
        return
    tensors = header.read(save_checkpoint(module, tmp_path / "x.safetensors", **arguments))
    (found,) = recognize(tensors, ARCHITECTURES, CHECKPOINTS)
    assert found.checkpoint == checkpoint
    assert same(component.load_component(found, tensors, device="cpu", dtype=torch.float32), module)
