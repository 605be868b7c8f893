"""LoRAs of Qwen-Image: diffusers loads ours, and we load those of other programs as diffusers does."""

from __future__ import annotations

import pytest
import torch
from diffusers.loaders.lora_pipeline import QwenImageLoraLoaderMixin
from safetensors.torch import load_file

from diffsynth import _discovery
from diffsynth.core.loader import component
from diffsynth.core.lora import LoRA, LoRALayer, fit, parse, save_lora, target_layers
from diffsynth.core.lora.format import to_state_dict
from diffsynth_qwen_image.checkpoints import ARCHITECTURES
from diffsynth_qwen_image.config import TINY_DIT


@pytest.fixture(scope="module")
def dit():
    return component.build(ARCHITECTURES[0], TINY_DIT)


def fitted(state_dict, module):
    checkpoints = _discovery.catalog().layouts()[1]
    return fit(parse(state_dict), module, checkpoints, architecture="qwen_image_dit").layers


def change(layer):
    return layer.scaled_up() @ layer.down.float()


def random_layers(dit, alpha=None):
    dice = torch.Generator().manual_seed(0)
    layers = {}
    for name in target_layers(dit, ARCHITECTURES[0].lora_targets):
        outputs, inputs = dit.get_submodule(name).weight.shape
        up = torch.randn(outputs, 2, generator=dice)
        layers[name] = LoRALayer(torch.randn(2, inputs, generator=dice), up, alpha)
    return layers


def assert_same(found, expected):
    assert found.keys() == expected.keys()
    for name, layer in expected.items():
        torch.testing.assert_close(change(found[name]), change(layer))


def test_targets_are_those_of_the_reference(dit):
    names = target_layers(dit, ARCHITECTURES[0].lora_targets)
    block = {name.removeprefix("transformer_blocks.0.") for name in names if name.startswith("transformer_blocks.0.")}
    assert {"img_mlp.net.2", "txt_mlp.net.2", "img_mod.1", "txt_mod.1", "attn.to_out.0", "attn.to_add_out"} < block
    assert len(names) == 12 * TINY_DIT.n_layers


@pytest.mark.parametrize("alpha", [None, 0.5])
def test_diffusers_reads_what_we_save(dit, alpha, tmp_path):
    layers = random_layers(dit, alpha)
    theirs = QwenImageLoraLoaderMixin.lora_state_dict(load_file(save_lora(LoRA(layers), tmp_path / "a.safetensors")))
    assert theirs.keys() == {f"transformer.{name}.lora_{side}.weight" for name in layers for side in "AB"}
    assert_same(fitted(theirs, dit), layers)


@pytest.mark.parametrize("alpha", [1.0, 4.0])
@pytest.mark.parametrize("names", ["lightning", "kohya"])
def test_files_of_other_programs(dit, alpha, names):
    """Lightning has an alpha for each layer, and the names of the layers; files of kohya have `lora_unet_`."""
    layers = random_layers(dit, alpha)
    named = layers if names == "lightning" else {f"lora_unet_{n.replace('.', '_')}": x for n, x in layers.items()}
    keys = to_state_dict(LoRA(named))
    keys = {key.replace("lora_A", "lora_down").replace("lora_B", "lora_up"): tensor for key, tensor in keys.items()}
    assert any(key.endswith(".alpha") for key in keys)
    assert_same(fitted(keys, dit), layers)
    theirs = QwenImageLoraLoaderMixin.lora_state_dict(dict(keys))
    assert_same(fitted(theirs, dit), layers)


def test_names_of_diffsynth_studio(dit):
    layers = random_layers(dit)
    keys = {key.replace(".weight", ".default.weight"): tensor for key, tensor in to_state_dict(LoRA(layers)).items()}
    assert_same(fitted(keys, dit), layers)
    assert_same(fitted({f"diffusion_model.{key}": tensor for key, tensor in keys.items()}, dit), layers)
