"""LoRAs of FLUX.1: files of kohya and ComfyUI as diffusers converts them, and layers of text encoders."""

import pytest
import torch
from diffusers.loaders.lora_pipeline import FluxLoraLoaderMixin

from diffsynth import _discovery
from diffsynth.core.loader import component
from diffsynth.core.lora import LoRA, LoRALayer, fit, parse, target_layers
from diffsynth.core.lora.format import to_state_dict
from diffsynth_flux.flux1.checkpoints import ARCHITECTURES
from diffsynth_flux.flux1.config import TINY_DIT
from flux1_oracles import tiny_pipelines


@pytest.fixture(scope="module")
def dit():
    return component.build(ARCHITECTURES[0], TINY_DIT)


def fitted(state_dict, module):
    checkpoints = _discovery.catalog().layouts()[1]
    return fit(parse(state_dict), module, checkpoints, architecture=ARCHITECTURES[0].name).layers


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


def for_kohya(layers):
    named = {f"lora_unet_{name.replace('.', '_')}": layer for name, layer in layers.items()}
    keys = to_state_dict(LoRA(named))
    return {key.replace("lora_A", "lora_down").replace("lora_B", "lora_up"): tensor for key, tensor in keys.items()}


def assert_same(found, expected):
    assert found.keys() == expected.keys()
    for name, layer in expected.items():
        torch.testing.assert_close(change(found[name]), change(layer))


def without_mlp(dit, layers):
    """diffusers splits a fused weight of its published size only: 3072 and 12288 rows."""
    return {name: layer for name, layer in layers.items() if "linear1" not in name}


@pytest.mark.parametrize("alpha", [None, 1.0])
def test_files_of_kohya(dit, alpha):
    layers = without_mlp(dit, random_layers(dit, alpha))
    keys = for_kohya(layers)
    assert_same(fitted(keys, dit), layers)
    theirs = FluxLoraLoaderMixin.lora_state_dict(dict(keys))
    assert "transformer.transformer_blocks.0.attn.to_q.lora_A.weight" in theirs
    assert_same(fitted(theirs, dit), layers)


def test_one_lora_for_two_programs(dit):
    """Published files have the names of kohya and those of diffusers in one."""
    layers = without_mlp(dit, random_layers(dit))
    keys = for_kohya(layers)
    assert_same(fitted(keys | FluxLoraLoaderMixin.lora_state_dict(dict(keys)), dit), layers)


TEXT = {
    "text_encoder_1": "text_model.encoder.layers.0.self_attn.q_proj",
    "text_encoder_2": "encoder.block.0.layer.0.SelfAttention.q",
}
WRITERS = {
    "kohya": ("lora_te1_{}", "lora_te3_{}"),
    "kohya, two": ("lora_te1_{}", "lora_te2_{}"),
    "diffusers": ("text_encoder.{}", "text_encoder_2.{}"),
    "comfy": ("text_encoders.clip_l.transformer.{}", "text_encoders.t5xxl.transformer.{}"),
}


@pytest.mark.parametrize("writer", WRITERS)
def test_each_text_encoder_gets_its_layers(writer):
    pipe = tiny_pipelines()[0]
    keys, before = for_kohya(random_layers(pipe.dit)), {}
    for (role, name), pattern in zip(TEXT.items(), WRITERS[writer], strict=True):
        weight = pipe.parts[role].get_submodule(name).weight
        before[role] = weight.detach().clone()
        named = pattern.format(name.replace(".", "_") if pattern.startswith("lora") else name)
        keys |= to_state_dict(LoRA({named: LoRALayer(torch.ones(1, weight.shape[1]), torch.ones(weight.shape[0], 1))}))
    pipe.load_lora(state_dict=keys)
    assert [lora.role for lora in pipe.loras] == ["dit", "text_encoder_1", "text_encoder_2"]
    for role, name in TEXT.items():
        torch.testing.assert_close(pipe.parts[role].get_submodule(name).weight.detach(), before[role] + 1)
