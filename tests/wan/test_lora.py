"""LoRAs of Wan: diffusers loads ours under its names, and we load them back from these names; lightx2v's; experts."""

import pytest
import torch
from diffusers.loaders.lora_pipeline import WanLoraLoaderMixin
from safetensors.torch import load_file

from diffsynth import _discovery
from diffsynth.core.loader import component
from diffsynth.core.loader.lora_bases import explain
from diffsynth.core.lora import LoRA, LoRALayer, fit, fuse, parse, save_lora, target_layers
from diffsynth.errors import KeyMismatch
from diffsynth_wan import WanVideoPipeline
from diffsynth_wan.checkpoints import ARCHITECTURES
from diffsynth_wan.config import WanDiTConfig
from diffsynth_wan.tiny import TINY_DIT
from wan_oracles import oracle_dit, our_dit, shared_parts

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


@pytest.mark.parametrize("prefix", ["diffusion_model.", ""])
def test_differences_of_lightx2v(prefix):
    """Its files have, beside the pairs, differences of norms (`diff`), biases (`diff_b`) and modulations (`diff_m`)."""
    dit = component.build(ARCHITECTURES[0], TINY_DIT).to_empty(device="cpu").requires_grad_(False)
    names = {
        "blocks.0.self_attn.norm_q.diff": "blocks.0.self_attn.norm_q.weight",
        "blocks.0.norm3.diff": "blocks.0.norm3.weight",
        "blocks.0.norm3.diff_b": "blocks.0.norm3.bias",
        "blocks.0.ffn.0.diff_b": "blocks.0.ffn.0.bias",
        "blocks.0.diff_m": "blocks.0.modulation",
        "head.diff_m": "head.modulation",
        "patch_embedding.diff": "patch_embedding.weight",
    }
    own = {key: torch.nn.init.normal_(tensor) for key, tensor in dit.state_dict().items()}
    before = {key: tensor.clone() for key, tensor in own.items()}
    keys = {f"{prefix}{name}": torch.ones(own[key].shape) for name, key in names.items()}
    fuse(dit, fit(parse(keys), dit, _discovery.catalog().layouts()[1], architecture=ARCHITECTURES[0].name), 0.5)
    for key, tensor in dit.state_dict().items():
        assert torch.equal(tensor, before[key] + 0.5 if key in names.values() else before[key])


def pipeline():
    dits = {name: our_dit(oracle_dit(seed)) for seed, name in enumerate(("dit", "dit2"))}
    return WanVideoPipeline.from_components(**shared_parts()[1], **dits, device="cpu", torch_dtype=torch.float32)


def test_a_lora_that_both_experts_could_have():
    pipe = pipeline()
    name = "blocks.0.self_attn.q"
    size = pipe.dit.get_submodule(name).weight.shape[0]
    one = {f"{name}.lora_A.weight": torch.ones(1, size), f"{name}.lora_B.weight": torch.ones(size, 1)}
    with pytest.raises(
        ValueError, match=r"layers of pipe.dit and of pipe.dit2. Name the component: load_lora\(pipe.dit, "
    ):
        pipe.load_lora(state_dict=one)
    pipe.load_lora(pipe.dit2, state_dict=one)
    assert [lora.role for lora in pipe.loras] == ["dit2"]
    second = {f"transformer{n}.{key}": tensor * (1 + len(n)) for key, tensor in one.items() for n in ("", "_2")}
    pipe.load_lora(state_dict=second)
    assert [lora.role for lora in pipe.loras] == ["dit2", "dit", "dit2"]


def test_a_lora_of_another_size_is_named():
    """A file for the 14B model, loaded into the 1.3B one, is no fault of the file."""
    checkpoints = _discovery.catalog().layouts()[1]
    small, large = WanDiTConfig(dim=1536, ffn_dim=8960, num_heads=12, num_layers=30), 5120
    module = component.build(ARCHITECTURES[0], small)
    pairs = {f"diffusion_model.blocks.{n}.self_attn.q.lora_{side}.weight" for n in range(40) for side in "AB"}
    keys = {key: torch.zeros((2, large) if "lora_A" in key else (large, 2)) for key in pairs}
    with pytest.raises(KeyMismatch, match=r"0 of its 40 layers fit.* It is a LoRA for .*14B.* \(wan_dit\)"):
        fit(parse(keys), module, checkpoints, architecture=ARCHITECTURES[0].name)
    part = {key: tensor for key, tensor in keys.items() if ".30." not in key}
    assert "14B" in explain("a.safetensors", {key: tuple(tensor.shape) for key, tensor in part.items()}, checkpoints)
