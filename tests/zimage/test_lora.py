"""LoRAs of Z-Image: diffusers loads ours, and we load those of other programs as diffusers does."""

import pytest
import torch
from diffusers.loaders.lora_pipeline import ZImageLoraLoaderMixin
from safetensors.torch import load_file

from diffsynth import _discovery
from diffsynth.core.loader import component
from diffsynth.core.loader.lora_bases import explain
from diffsynth.core.lora import LoRA, LoRALayer, fit, parse, save_lora, target_layers
from diffsynth.core.lora.format import to_state_dict
from diffsynth.errors import KeyMismatch
from diffsynth_zimage.checkpoints import ARCHITECTURES
from diffsynth_zimage.config import TINY_DIT, ZImageDiTConfig
from tiny_z_image import SMALL, tiny_z_image


@pytest.fixture(scope="module")
def dit():
    return component.build(ARCHITECTURES[0], TINY_DIT)


def fitted(state_dict, module):
    checkpoints = _discovery.catalog().layouts()[1]
    return fit(parse(state_dict), module, checkpoints, architecture="z_image_dit").layers


def change(layer):
    return layer.scaled_up() @ layer.down.float()


def layer_of(outputs, inputs, dice, alpha=None):
    return LoRALayer(torch.randn(2, inputs, generator=dice), torch.randn(outputs, 2, generator=dice), alpha)


@pytest.mark.parametrize("alpha", [None, 0.5])
def test_diffusers_reads_what_we_save(dit, alpha, tmp_path):
    dice = torch.Generator().manual_seed(0)
    names = target_layers(dit, ARCHITECTURES[0].lora_targets)
    layers = {name: layer_of(*dit.get_submodule(name).weight.shape, dice, alpha) for name in names}
    file = save_lora(LoRA(layers), tmp_path / "lora.safetensors")
    theirs = ZImageLoraLoaderMixin.lora_state_dict(load_file(file))
    assert theirs.keys() == {f"transformer.{name}.lora_{side}.weight" for name in names for side in "AB"}
    again = fitted(theirs, dit)
    for name, layer in layers.items():
        torch.testing.assert_close(change(again[name]), change(layer))


def test_fused_attention_of_kohya(dit):
    """LoRAs of sd-scripts use the original code's names, where query, key and value are one layer."""
    dice, dim = torch.Generator().manual_seed(0), TINY_DIT.dim
    parts = {"attention.qkv": (3 * dim, dim), "attention.out": (dim, dim)}
    named = {f"layers.0.{part}": layer_of(*shape, dice, alpha=1.0) for part, shape in parts.items()}
    keys = {
        key.replace("lora_A", "lora_down").replace("lora_B", "lora_up"): tensor
        for name, layer in named.items()
        for key, tensor in to_state_dict(LoRA({f"lora_unet_{name.replace('.', '_')}": layer})).items()
    }
    ours = fitted(keys, dit)
    theirs = fitted(ZImageLoraLoaderMixin.lora_state_dict(dict(keys)), dit)
    block = "layers.0.attention"
    assert ours.keys() == theirs.keys() == {f"{block}.{part}" for part in ("to_q", "to_k", "to_v", "to_out.0")}
    for name, layer in ours.items():
        torch.testing.assert_close(change(layer), change(theirs[name]))


PUBLISHED = {
    "DiffSynth-Studio/Z-Image-Turbo-DistillPatch": "{}.lora_{side}.default.weight",
    "ostris/zimage_turbo_training_adapter": "diffusion_model.{}.lora_{side}.weight",
}
"""Published LoRA -> the spelling of its keys: that of DiffSynth-Studio, and that of ai-toolkit."""


@pytest.mark.parametrize("repository", PUBLISHED)
def test_published_loras_are_ordinary_ones(repository):
    """On the linear layers of all blocks and refiners, strength 1 without an alpha; fused and hot are the same."""
    pipe, dice = tiny_z_image(n_layers=2), torch.Generator().manual_seed(3)
    targets = target_layers(pipe.dit, ARCHITECTURES[0].lora_targets)
    assert len(targets) == 7 * 4
    made = {name: layer_of(*pipe.dit.get_submodule(name).weight.shape, dice) for name in targets}
    keys = {
        PUBLISHED[repository].format(name, side=side): getattr(layer, part)
        for name, layer in made.items()
        for side, part in (("A", "down"), ("B", "up"))
    }
    call = {**SMALL, "num_inference_steps": 2}
    plain = pipe("a", **call)
    pipe.load_lora(pipe.dit, state_dict=keys, hotload=True)
    hot = pipe("a", **call)
    pipe.clear_lora()
    weights = {name: pipe.dit.get_submodule(name).weight.detach().clone() for name in targets}
    pipe.load_lora(pipe.dit, state_dict=keys)
    for name, layer in made.items():
        torch.testing.assert_close(pipe.dit.get_submodule(name).weight, weights[name] + layer.up @ layer.down)
    torch.testing.assert_close(pipe("a", **call), hot, rtol=1e-3, atol=1e-3)
    assert float((hot - plain).abs().max()) > 1e-2


SIZE = ZImageDiTConfig().dim
TO_Q = "diffusion_model.layers.0.attention.to_q"
A, B = {f"{TO_Q}.lora_A.weight": (4, SIZE)}, {f"{TO_Q}.lora_B.weight": (SIZE, 4)}
QKV = {key.replace("to_q", "qkv"): shape for key, shape in A.items()} | {
    key.replace("to_q", "qkv"): (3 * SIZE, 4) for key in B
}
FILES = {
    "LoRA": A | B,
    "fused": QKV,
    "fused and split": A | B | QKV,
    "half a pair": A,
    "DoRA": A | B | {f"{TO_Q}.dora_scale": (SIZE, 1)},
    "DoRA of another size": A | B | {f"{TO_Q}.dora_scale": (9, 1)},
    "DoRA, fused": QKV | {f"{TO_Q.replace('to_q', 'qkv')}.dora_scale": (3 * SIZE, 1)},
    "DoRA by columns, fused": QKV | {f"{TO_Q.replace('to_q', 'qkv')}.dora_scale": (1, SIZE)},
    "LoKr": {f"{TO_Q}.lokr_w1": (4, 4), f"{TO_Q}.lokr_w2": (SIZE // 4, SIZE // 4)},
    "LoKr of another size": {f"{TO_Q}.lokr_w1": (4, 4), f"{TO_Q}.lokr_w2": (SIZE // 4, SIZE // 2)},
    "difference": {"diffusion_model.layers.0.attention_norm1.diff": (SIZE,)},
    "no such bias": A | B | {f"{TO_Q}.diff_b": (SIZE,)},
    "no such layer": A | B | {key.replace(".0.", ".77."): shape for key, shape in (A | B).items()},
    "another output": A | {f"{TO_Q}.lora_B.weight": (SIZE + 1, 4)},
    "unknown key": A | B | {"surprise": (1,)},
    "OFT": A | B | {"a.oft_blocks": (2, 2, 2)},
}


@pytest.mark.parametrize("name", FILES)
def test_what_is_said_of_a_file_is_what_loading_does(name):
    """The network has its published size, without memory."""
    checkpoints = _discovery.catalog().layouts()[1]
    said = explain("a.safetensors", FILES[name], checkpoints)
    module = component.build(ARCHITECTURES[0], ZImageDiTConfig())
    keys = {key: torch.zeros(shape) for key, shape in FILES[name].items()}
    try:
        fit(parse(keys), module, checkpoints, architecture="z_image_dit")
        loads = True
    except KeyMismatch:
        loads = False
    sent = "Load that model, then " in said
    assert sent == loads, said
    assert ("load_lora refuses it" in said or "another size" in said) == (not loads), said
