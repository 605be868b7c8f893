"""Weights changed by LoRA, DoRA, LoHa and LoKr are those that peft merges, read from the folder that peft saves."""

import pytest
import torch
from peft import LoHaConfig, LoKrConfig, LoraConfig, get_peft_model

import lora_networks as small
from diffsynth.core.lora import add_hot, fit, fuse, parse, read_lora
from diffsynth.errors import KeyMismatch

CLOSE = {"rtol": 1e-5, "atol": 1e-6}
"""fp32; the largest difference seen is 4.8e-7."""

LAYERS = ["to_q", "to_v", "feed_forward.2"]
CONV = [*LAYERS, "patch"]

CONFIGS = {
    "LoRA": LoraConfig(r=3, lora_alpha=7, target_modules=LAYERS),
    "rsLoRA": LoraConfig(r=3, lora_alpha=7, use_rslora=True, target_modules=LAYERS),
    "patterns": LoraConfig(
        r=3,
        lora_alpha=7,
        target_modules=LAYERS,
        rank_pattern={"blocks.0.attn.to_q": 2, r".*feed_forward\.2": 4},
        alpha_pattern={"to_q": 5, "^blocks.1.attn.to_v": 9, r"blocks\.\d+\.attn\.to_v": 2},
    ),
    "biases": LoraConfig(r=3, lora_alpha=7, lora_bias=True, target_modules=LAYERS),
    "convolution": LoraConfig(r=3, lora_alpha=7, target_modules=CONV),
    "DoRA": LoraConfig(r=3, lora_alpha=7, use_dora=True, target_modules=LAYERS),
    "DoRA of a convolution": LoraConfig(r=3, lora_alpha=7, use_dora=True, target_modules=CONV),
    "LoHa": LoHaConfig(r=3, alpha=7, target_modules=LAYERS),
    "LoHa of a convolution": LoHaConfig(r=3, alpha=7, target_modules=CONV),
    "LoHa with cores": LoHaConfig(r=3, alpha=7, use_effective_conv2d=True, target_modules=CONV),
    "LoKr": LoKrConfig(r=1, alpha=5, target_modules=LAYERS),
    "LoKr, whole factors": LoKrConfig(r=8, alpha=5, target_modules=LAYERS),
    "LoKr, both factors as products": LoKrConfig(r=1, alpha=5, decompose_both=True, target_modules=LAYERS),
    "LoKr of a convolution": LoKrConfig(r=1, alpha=5, target_modules=CONV),
    "LoKr with a core": LoKrConfig(r=1, alpha=5, use_effective_conv2d=True, target_modules=CONV),
}


@torch.no_grad()
def saved_by_peft(config, folder):
    """Return the network with peft's merged adapter of random values, after saving the adapter."""
    model = get_peft_model(small.network(), config)
    dice = torch.Generator().manual_seed(1)
    for name, parameter in model.named_parameters():
        if any(mark in name for mark in ("lora_A", "lora_B", "hada_", "lokr_")):
            parameter.copy_(torch.randn(parameter.shape, generator=dice) / 3)
        elif "magnitude" in name:
            parameter.mul_(torch.rand(parameter.shape, generator=dice) + 0.5)
    model.save_pretrained(folder)
    return model.merge_and_unload()


@pytest.mark.filterwarnings("ignore:Adapter 'default'")  # peft 0.21 takes its own biases for damaged matrices
@pytest.mark.parametrize("name", CONFIGS)
def test_weights_are_those_of_peft(name, tmp_path):
    expected = saved_by_peft(CONFIGS[name], tmp_path)
    module = small.network()
    fuse(module, fit(read_lora(tmp_path), module))
    found, plain = module.state_dict(), small.network().state_dict()
    changed = [key for key, tensor in expected.state_dict().items() if not torch.equal(tensor, plain[key])]
    assert len(changed) >= 6
    for key, tensor in expected.state_dict().items():
        torch.testing.assert_close(found[key], tensor, **CLOSE)
        assert key in changed or torch.equal(found[key], plain[key])


def test_a_dora_is_interpolated(tmp_path):
    """ComfyUI and LyCORIS do so, too: at strength 0 the model is unchanged, whatever the magnitudes."""
    expected, plain = saved_by_peft(CONFIGS["DoRA"], tmp_path).state_dict(), small.network().state_dict()
    for strength in (0.0, 0.5):
        module = small.network()
        fuse(module, fit(read_lora(tmp_path), module), strength)
        for key, tensor in module.state_dict().items():
            torch.testing.assert_close(tensor, plain[key] + strength * (expected[key] - plain[key]), **CLOSE)


def test_magnitudes_by_input():
    """LyCORIS before its version 3 normalised the columns."""
    down, up = small.factors(names=["embed"])["embed"]
    magnitude = torch.rand(1, 5) + 0.5
    keys = small.state_dict(made={"embed": (down, up)}) | {"embed.dora_scale": magnitude}
    module, weight = small.network(), small.network().embed.weight
    fuse(module, fit(parse(keys), module))
    expected = (weight + up @ down) * (magnitude / (weight + up @ down).norm(dim=0, keepdim=True))
    torch.testing.assert_close(module.embed.weight, expected, **CLOSE)


@pytest.mark.parametrize("sides", [(1, 1, 1), (1, 0, None), (0, 0, 0)])
def test_magnitudes_of_weights_that_are_joined(sides):
    """Each part is normalised by its own columns (1), by its rows (0), or not at all, as in its file."""
    module, dice = small.Turned().requires_grad_(False), torch.Generator().manual_seed(0)
    parts, keys = dict(zip(("to_q", "to_k", "to_v"), module.qkv.weight.clone().chunk(3), strict=True)), {}
    for axis, (name, weight) in zip(sides, parts.items(), strict=True):
        down, up = torch.randn(2, 6, generator=dice), torch.randn(4, 2, generator=dice)
        changed = weight + up @ down
        keys |= small.state_dict("lora_transformer_{}.lora_{down,up}.weight", {name: (down, up)})
        if axis is not None:
            length = changed.norm(dim=1 - axis, keepdim=True)
            magnitude = torch.rand(length.shape, generator=dice) + 0.5
            keys[f"lora_transformer_{name}.dora_scale"] = magnitude
            changed = changed * (magnitude / length)
        parts[name] = changed
    fuse(module, fit(parse(keys), module, small.CHECKPOINTS, architecture="turned"))
    torch.testing.assert_close(module.qkv.weight, torch.cat(list(parts.values())), **CLOSE)


def test_magnitudes_by_input_of_a_weight_that_is_split():
    down, up = torch.randn(2, 6), torch.randn(12, 2)
    keys = small.state_dict(made={"fused": (down, up)}) | {"fused.dora_scale": torch.ones(1, 6)}
    with pytest.raises(KeyMismatch, match="converted by Split, under which the magnitudes of a DoRA have no meaning"):
        fit(parse(keys), small.Turned(), small.CHECKPOINTS, architecture="turned")


def test_a_convolution_of_three_factors():
    """LyCORIS writes `lora_mid` for its Tucker form."""
    down, mid, up = torch.randn(3, 3, 1, 1), torch.randn(4, 3, 2, 2), torch.randn(8, 4, 1, 1)
    keys = {f"patch.lora_{side}.weight": tensor for side, tensor in (("down", down), ("mid", mid), ("up", up))}
    module, weight = small.network(), small.network().patch.weight
    fuse(module, fit(parse(keys | {"patch.alpha": torch.tensor(6.0)}), module))
    steps = torch.nn.functional.conv2d(torch.eye(3).reshape(3, 3, 1, 1), down)
    steps = torch.nn.functional.conv2d(torch.nn.functional.pad(steps, (1, 1, 1, 1)), mid)
    change = torch.nn.functional.conv2d(steps, up).flip(2, 3).transpose(0, 1)
    torch.testing.assert_close(module.patch.weight, weight + 2 * change, rtol=1e-4, atol=1e-5)


def test_an_alpha_beside_whole_factors_means_nothing():
    """LyCORIS divides an alpha by the rank of the products, and writes a huge one where there is none."""
    keys = {"embed.lokr_w1": torch.ones(2, 1), "embed.lokr_w2": torch.ones(4, 5), "embed.alpha": torch.tensor(9e9)}
    module, weight = small.network(), small.network().embed.weight
    fuse(module, fit(parse(keys), module))
    torch.testing.assert_close(module.embed.weight, weight + 1)


class Table(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.table = torch.nn.Embedding(7, 4, _weight=torch.zeros(7, 4))
        self.norm = torch.nn.LayerNorm(4)
        self.modulation = torch.nn.Parameter(torch.zeros(1, 6, 4), requires_grad=False)
        self.bare = torch.nn.Linear(4, 4, bias=False)


def test_embeddings_norms_and_bare_parameters():
    first, second = torch.randn(2, 7), torch.randn(4, 2)
    keys = {
        "table.lora_embedding_A": first,
        "table.lora_embedding_B": second,
        "norm.w_norm": torch.full((4,), 2.0),
        "norm.b_norm": torch.full((4,), 3.0),
        "modulation.diff": torch.full((1, 6, 4), 4.0),
    }
    module = Table()
    fuse(module, fit(parse(keys), module), 0.5)
    torch.testing.assert_close(module.table.weight, 0.5 * (second @ first).T)
    assert torch.equal(module.norm.weight, torch.full((4,), 2.0))
    assert torch.equal(module.norm.bias, torch.full((4,), 1.5))
    assert torch.equal(module.modulation, torch.full((1, 6, 4), 2.0))


def test_what_can_only_be_fused_is_no_hot_lora():
    for keys, kind in (
        ({"norm.diff": torch.ones(4)}, "difference"),
        ({"bare.lokr_w1": torch.ones(2, 2), "bare.lokr_w2": torch.ones(2, 2)}, "LoKr"),
        (
            small.state_dict(made={"bare": (torch.ones(1, 4), torch.ones(4, 1))}) | {"bare.dora_scale": torch.ones(4)},
            "DoRA",
        ),
    ):
        module = Table()
        with pytest.raises(
            ValueError, match=f"by {kind}, which cannot be computed beside the weights. Use hotload=False"
        ):
            add_hot(module, fit(parse(keys), module))
