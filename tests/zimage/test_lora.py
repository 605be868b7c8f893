"""LoRAs of Z-Image: diffusers loads ours, and we load those of other programs as diffusers does."""

import pytest
import torch
from diffusers.loaders.lora_pipeline import ZImageLoraLoaderMixin
from safetensors.torch import load_file

from diffsynth import _discovery
from diffsynth.core.loader import component
from diffsynth.core.lora import LoRA, LoRALayer, fit, parse, save_lora, target_layers
from diffsynth.core.lora.format import to_state_dict
from diffsynth_zimage.checkpoints import ARCHITECTURES
from diffsynth_zimage.config import TINY_DIT


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
