"""LoRAs of Wan: diffusers loads ours under its names, and we load them back from these names."""

import torch
from diffusers.loaders.lora_pipeline import WanLoraLoaderMixin
from safetensors.torch import load_file

from diffsynth import _discovery
from diffsynth.core.loader import component
from diffsynth.core.lora import LoRA, LoRALayer, fit, parse, save_lora, target_layers
from diffsynth_wan.checkpoints import ARCHITECTURES
from diffsynth_wan.tiny import TINY_DIT

OTHERS = ("time_projection.1", "text_embedding.0", "text_embedding.2", "time_embedding.0", "time_embedding.2")


def test_there_and_back(tmp_path):
    architecture, dice = ARCHITECTURES[0], torch.Generator().manual_seed(0)
    dit = component.build(architecture, TINY_DIT)
    checkpoints = _discovery.catalog().layouts()[1]
    layers = {}
    for name in (*target_layers(dit, architecture.lora_targets), *OTHERS):
        outputs, inputs = dit.get_submodule(name).weight.shape
        layers[name] = LoRALayer(torch.randn(2, inputs, generator=dice), torch.randn(outputs, 2, generator=dice))
    theirs = WanLoraLoaderMixin.lora_state_dict(load_file(save_lora(LoRA(layers), tmp_path / "lora.safetensors")))
    assert "transformer.blocks.0.attn2.to_out.0.lora_A.weight" in theirs
    for keys in (theirs, {f"base_model.model.{key}": tensor for key, tensor in theirs.items()}):
        found = fit(parse(keys), dit, checkpoints, architecture=architecture.name).layers
        assert found.keys() == layers.keys()
        for name, layer in layers.items():
            assert torch.equal(found[name].down, layer.down)
            assert torch.equal(found[name].up, layer.up)
