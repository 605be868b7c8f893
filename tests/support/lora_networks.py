"""A small network and LoRAs for it."""

import torch
from torch import nn

from diffsynth.core.loader import convert
from diffsynth.spec import CheckpointSpec


class Attention(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.to_q, self.to_k, self.to_v = (nn.Linear(width, width) for _ in range(3))
        self.to_out = nn.ModuleList([nn.Linear(width, width)])

    def forward(self, x):
        return self.to_out[0](torch.tanh(self.to_q(x)) * self.to_k(x) + self.to_v(x))


class Block(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.attn = Attention(width)
        self.feed_forward = nn.Sequential(nn.Linear(width, 2 * width), nn.SiLU(), nn.Linear(2 * width, width))

    def forward(self, x):
        return x + self.feed_forward(x + self.attn(x))


class Network(nn.Module):
    def __init__(self, width=8, depth=2):
        super().__init__()
        self.patch = nn.Conv2d(3, width, 2, 2)
        self.embed = nn.Linear(5, width)
        self.blocks = nn.ModuleList(Block(width) for _ in range(depth))
        self.proj_out = nn.Linear(width, 3)

    def forward(self, x):
        x = self.embed(x)
        for block in self.blocks:
            x = block(x)
        return self.proj_out(x)


TARGETS = [
    f"blocks.{n}.{part}" for n in range(2) for part in ("attn.to_q", "attn.to_v", "attn.to_out.0", "feed_forward.2")
]
INPUTS = torch.linspace(-1, 1, 30).reshape(1, 6, 5)


def network(dtype=torch.float32):
    torch.manual_seed(0)
    return Network().to(dtype).eval().requires_grad_(False)


def factors(module=None, names=TARGETS, rank=3, seed=1):
    """Return layer name -> (A, B), random matrices of this rank."""
    module, dice = module or network(), torch.Generator().manual_seed(seed)
    made = {}
    for name in names:
        outputs, inputs = module.get_submodule(name).weight.shape
        pair = torch.randn(rank, inputs, generator=dice), torch.randn(outputs, rank, generator=dice)
        made[name] = (pair[0] / 4, pair[1] / 4)
    return made


def state_dict(spelling="{}.lora_{A,B}.weight", made=None, alpha=None, alpha_key="{}.alpha"):
    """Return LoRA factors under the key names of a file format.

    Args:
        spelling: pattern of a key: `{}` is the layer name, `[]` the name with underscores, `{A,B}` or `{down,up}` the
            two matrices.
        made: layer name -> (A, B); those of `factors()` by default.
        alpha: one value for all layers, or layer name -> value; None writes none.
        alpha_key: pattern of the key of an alpha.
    """
    before, _, rest = spelling.partition("{A,B}" if "{A,B}" in spelling else "{down,up}")
    sides = ("A", "B") if "{A,B}" in spelling else ("down", "up")
    tensors = {}
    for name, pair in (made or factors()).items():
        for side, tensor in zip(sides, pair, strict=True):
            tensors[_named(f"{before}{side}{rest}", name)] = tensor
        if alpha is not None:
            value = alpha[name] if isinstance(alpha, dict) else alpha
            tensors[_named(alpha_key, name)] = torch.tensor(float(value))
    return tensors


def _named(text, name):
    return text.replace("{}", name).replace("[]", name.replace(".", "_"))


@torch.no_grad()
def changed(made, strength=1.0, scale=None):
    """Return the network with `strength * scale * B @ A` added to its weights."""
    module = network()
    for name, (down, up) in made.items():
        module.get_submodule(name).weight += strength * (1.0 if scale is None else scale[name]) * (up @ down)
    return module


class Turned(nn.Module):
    """One linear layer for each kind of difference between two layouts: split, fused, reordered, renamed."""

    def __init__(self):
        super().__init__()
        self.q, self.k, self.v = nn.Linear(6, 4), nn.Linear(6, 4), nn.Linear(6, 4)
        self.qkv = nn.Linear(6, 12)
        self.wide = nn.Linear(9, 4)
        self.left, self.right = nn.Linear(3, 4), nn.Linear(6, 4)
        self.shift_scale = nn.Linear(6, 8)
        self.plain = nn.Linear(6, 4)


RULES = (
    convert.Split("fused.weight", ("q.weight", "k.weight", "v.weight")),
    convert.Fuse(("to_q.weight", "to_k.weight", "to_v.weight"), "qkv.weight"),
    convert.Fuse(("narrow.weight", "broad.weight"), "wide.weight", dim=1),
    convert.Split("long.weight", ("left.weight", "right.weight"), dim=1, sizes=(3, 6)),
    convert.ReorderChunks("scale_shift.weight", "shift_scale.weight", (1, 0)),
    convert.Rename("simple.weight", "plain.weight"),
    *(convert.Rename(f"{name}.bias", f"{name}.bias") for name in ("q", "k", "v")),
)
"""Rules that convert the layers `FILE` of another layout to those of `Turned`."""

FILE = {
    "fused": (12, 6), "to_q": (4, 6), "to_k": (4, 6), "to_v": (4, 6), "narrow": (4, 4), "broad": (4, 5),
    "long": (4, 9), "scale_shift": (8, 6), "simple": (4, 6),
}  # fmt: skip
"""Layer of the other layout -> shape of its weight."""

CHECKPOINTS = (
    CheckpointSpec(name="turned", architecture="turned", rules="lora_networks:RULES"),
    CheckpointSpec(name="other", architecture="other"),
)
