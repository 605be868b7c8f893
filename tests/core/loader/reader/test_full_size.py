"""Loading published checkpoints of 6, 4 and 20 billion parameters, without their weights.

The files are sparse, with real headers and sizes: all data that is read is zero.
"""

import dataclasses
import gzip
import json
import sys
import types
from math import prod
from pathlib import Path

import pytest
import torch
from torch import nn

from diffsynth import _discovery
from diffsynth.core.loader import component, header
from diffsynth.core.loader.reader.blocks import BlockReader
from diffsynth.core.loader.recognize import recognize
from diffsynth.spec import ArchitectureSpec, CheckpointSpec

LAYOUTS = Path(__file__).parents[3] / "data" / "layouts"
GIB = 2**30


def layout(name):
    return json.loads(gzip.decompress((LAYOUTS / f"{name}.json.gz").read_bytes()))


def sparse_shards(folder, shapes, count):
    """Write sparse bf16 files of these tensors."""
    keys, files = list(shapes), []
    for n in range(count):
        entries, end = {}, 0
        for key in keys[n * len(keys) // count : (n + 1) * len(keys) // count]:
            size = 2 * prod(shapes[key])
            entries[key] = {"dtype": "BF16", "shape": shapes[key], "data_offsets": [end, end + size]}
            end += size
        text = json.dumps(entries).encode()
        files.append(folder / f"model-{n + 1:05d}-of-{count:05d}.safetensors")
        with files[-1].open("wb") as stream:
            stream.write(len(text).to_bytes(8, "little") + text)
            stream.truncate(8 + len(text) + end)
        assert files[-1].stat().st_blocks * 512 < 2**21
    return files


@dataclasses.dataclass(frozen=True)
class Config:
    layers: int = 60


class Recorded(nn.Module):
    """A module with the names and shapes of a layout, without a forward."""

    def __init__(self, config):
        super().__init__()
        self.config = config
        for key, shape in layout("Qwen-Image--qwen_image_dit")["tensors"].items():
            *parts, last = key.split(".")
            module = self
            for part in parts:
                if part not in module._modules:
                    module.add_module(part, nn.Module())
                module = module._modules[part]
            module.register_parameter(last, nn.Parameter(torch.empty(shape)))


def infer(shapes):
    return Config(len({key.split(".")[1] for key in shapes if key.startswith("transformer_blocks.")}))


@pytest.fixture
def catalog(monkeypatch):
    """Return the installed architectures, and one for a layout whose family may not be installed."""
    module = types.ModuleType("recorded")
    vars(module).update(Recorded=Recorded, Config=Config, infer=infer)
    monkeypatch.setitem(sys.modules, "recorded", module)
    architecture = ArchitectureSpec(
        name="recorded", module="recorded:Recorded", config="recorded:Config", infer_config="recorded:infer",
        required=("img_in.weight",), tiny="recorded:Config", tiny_inputs="recorded:Config",
    )  # fmt: skip
    signature = layout("Qwen-Image--qwen_image_dit")["signature"]
    architectures, checkpoints = _discovery.catalog().layouts()
    # Where the real one is installed it would be a second owner of this signature.
    others = [checkpoint for checkpoint in checkpoints if checkpoint.signature != signature]
    published = CheckpointSpec(name="recorded", architecture="recorded", signature=signature)
    return {**architectures, "recorded": architecture}, [*others, published]


@pytest.mark.parametrize(
    ("name", "shards", "architecture", "block"),
    [
        ("Z-Image-Turbo--z_image_dit", 3, "z_image_dit", "layers.29."),
        ("Z-Image-Turbo--z_image_text_encoder", 3, "qwen3_text_encoder", "model.layers.35."),
        ("Qwen-Image--qwen_image_dit", 9, "recorded", "transformer_blocks.59."),
    ],
)
def test_a_checkpoint_of_full_size(tmp_path, monkeypatch, catalog, name, shards, architecture, block):
    shapes = layout(name)["tensors"]
    head = header.read(sparse_shards(tmp_path, shapes, shards))
    (recognized,) = recognize(head, *catalog)
    assert (recognized.architecture.name, recognized.tier) == (architecture, "signature")

    with monkeypatch.context() as patched:
        patched.setattr(BlockReader, "_read", None)
        module = component.load_component(recognized, head, device="meta", dtype=torch.bfloat16)
        parameters = dict(module.named_parameters())
        assert sum(parameter.numel() for parameter in parameters.values()) == sum(map(prod, shapes.values()))
        assert all(parameter.is_meta for parameter in parameters.values())

    module, source = component.open_component(recognized, head, dtype=torch.bfloat16)
    keys = source.targets_of(block)
    assert len(keys) > 10
    assert source.size() > 7 * GIB
    assert source.size(keys) < source.size() / 25
    read = source.read(keys, copy=False)
    assert {key: tuple(tensor.shape) for key, tensor in read.items()} == {
        key: tuple(tensor.shape) for key, tensor in module.state_dict().items() if key.startswith(block)
    }
    assert not any(bool(tensor.any()) for tensor in read.values())
