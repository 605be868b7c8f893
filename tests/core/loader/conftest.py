"""A test family of two small networks, importable by reference like a plugin's."""

import dataclasses
import sys
import types

import pytest
import torch
from torch import nn

from diffsynth.core.loader.convert import Drop, Fuse, Rename, Split
from diffsynth.spec import ArchitectureSpec, CheckpointSpec


@dataclasses.dataclass(frozen=True)
class NetConfig:
    width: int = 4
    layers: int = 2


class Net(nn.Module):
    """`layers.{n}.q/k/v` and a norm, with a table that no file holds."""

    def __init__(self, config):
        super().__init__()
        self.config = config
        self.layers = nn.ModuleList(
            nn.ModuleDict({name: nn.Linear(config.width, config.width, bias=False) for name in ("q", "k", "v")})
            for _ in range(config.layers)
        )
        self.norm = nn.LayerNorm(config.width)
        self.register_buffer("table", torch.zeros(3), persistent=False)
        self.register_buffer("count", torch.zeros((), dtype=torch.int64))

    def reset_buffers(self):
        self.table = torch.arange(3.0)


class Head(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.config = config
        self.proj = nn.Linear(config.width, 2)


def infer_net(shapes):
    (width,) = shapes["norm.weight"]
    return NetConfig(width, len([key for key in shapes if key.endswith(".q.weight")]))


def infer_head(shapes):
    if shapes["proj.weight"][0] != 2:
        raise ValueError("a head has two outputs")
    return NetConfig(shapes["proj.weight"][1], 0)


FUSED = (
    Split("blocks.{n}.qkv.weight", tuple(f"layers.{{n}}.{part}.weight" for part in "qkv")),
    Rename("final_norm.{*}", "norm.{*}"),
    Drop("unread"),
)
HEAD_PARTS = (Fuse(("proj.a", "proj.b"), "proj.weight"),)


def _architecture(name, infer, required):
    return ArchitectureSpec(
        name=name,
        module=f"toy_loader:{name.capitalize()}",
        config="toy_loader:NetConfig",
        infer_config=f"toy_loader:{infer}",
        required=required,
        tiny="toy_loader:NetConfig",
        tiny_inputs="toy_loader:NetConfig",
        high_precision=("*norm*",),
    )


ARCHITECTURES = {
    "net": _architecture("net", "infer_net", ("layers.{n}.q.weight", "norm.weight", "count")),
    "head": _architecture("head", "infer_head", ("proj.weight", "proj.bias")),
}
CHECKPOINTS = (
    CheckpointSpec(name="net", architecture="net"),
    CheckpointSpec(name="net/fused", architecture="net", rules="toy_loader:FUSED"),
    CheckpointSpec(name="head", architecture="head"),
    CheckpointSpec(name="head/parts", architecture="head", rules="toy_loader:HEAD_PARTS"),
)


@pytest.fixture
def toy(monkeypatch):
    """Return the family as the module `toy_loader`."""
    module = types.ModuleType("toy_loader")
    vars(module).update({name: value for name, value in globals().items() if not name.startswith("__")})
    monkeypatch.setitem(sys.modules, "toy_loader", module)
    return module
