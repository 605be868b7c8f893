"""LoRAs of Z-Image: every program's file as diffusers 0.42.1 converts it, the weights they make, and published ones."""

import copy

import pytest
import torch
from diffusers.loaders.lora_pipeline import ZImageLoraLoaderMixin
from safetensors.torch import load_file, save_file

import lora_files
from diffsynth import _discovery
from diffsynth.core.loader import component
from diffsynth.core.loader.lora_bases import explain
from diffsynth.core.lora import fit, fuse, parse, save_lora, target_layers
from diffsynth.core.lora.format import to_state_dict
from diffsynth.errors import KeyMismatch
from diffsynth_zimage.checkpoints import ARCHITECTURES, LORA_TARGETS
from diffsynth_zimage.config import TINY_DIT, TINY_OMNI_DIT, ZImageDiTConfig
from lora_files import ALPHAS, assert_added, assert_same, random_lora
from tiny_z_image import SMALL, tiny_z_image

DIT, OMNI = ARCHITECTURES[:2]
SPELLINGS = {
    "ai-toolkit": "diffusion_model.layers.0.attention.to_q.lora_A.weight",
    "comfyui": "diffusion_model.layers.0.attention.to_q.lora_down.weight",
    "diffusers": "transformer.layers.0.attention.to_q.lora_A.weight",
    "kohya": "lora_unet_layers_0_attention_qkv.lora_down.weight",
    "peft": "base_model.model.layers.0.attention.to_q.lora_A.weight",
}
"""Spelling -> one of its keys."""

KOHYA = (*LORA_TARGETS, "adaLN_modulation.0", "t_embedder.mlp.0", "t_embedder.mlp.2", "cap_embedder.1")
"""Ends of the names of the layers whose names in files of kohya diffusers reads; it misses the first and the last."""


@pytest.fixture(scope="module")
def dit():
    return component.build(DIT, TINY_DIT)


def fitted(state_dict, module):
    return lora_files.fitted(state_dict, module, DIT)


def written(lora, module, spelling):
    return lora_files.written(lora, module, DIT, spelling)


@pytest.mark.parametrize("alphas", [(None,), ALPHAS], ids=["none", "each"])
@pytest.mark.parametrize("spelling", SPELLINGS)
def test_diffusers_reads_what_we_write_and_we_read_what_it_makes(dit, spelling, alphas):
    """Alphas differ from layer to layer, also those of q, k and v, which are one layer in files of kohya."""
    every = random_lora(dit, alphas=alphas)
    assert_same(fitted(written(every, dit, spelling), dit), every)
    lora = random_lora(dit, KOHYA if spelling == "kohya" else ("",), alphas=alphas)
    keys = written(lora, dit, spelling)
    assert SPELLINGS[spelling] in keys
    theirs = ZImageLoraLoaderMixin.lora_state_dict(dict(keys))
    assert not any("alpha" in key for key in theirs)
    if spelling != "peft":  # which diffusers leaves as it is
        assert theirs.keys() == {f"transformer.{name}.lora_{side}.weight" for name in lora.layers for side in "AB"}
    assert_same(fitted(theirs, dit), lora)


@pytest.mark.parametrize("alphas", [(None,), ALPHAS], ids=["none", "each"])
def test_diffusers_reads_what_we_save(dit, alphas, tmp_path):
    lora = random_lora(dit, LORA_TARGETS, alphas=alphas)
    theirs = ZImageLoraLoaderMixin.lora_state_dict(load_file(save_lora(lora, tmp_path / "lora.safetensors")))
    assert_same(fitted(theirs, dit), lora)


@pytest.mark.parametrize("spelling", SPELLINGS)
def test_the_network_of_omni_has_the_same_files(spelling):
    omni = component.build(OMNI, TINY_OMNI_DIT)
    lora = random_lora(omni, LORA_TARGETS, alphas=ALPHAS)
    assert any("siglip_refiner" in name for name in lora.layers)
    keys = lora_files.written(lora, omni, OMNI, spelling)
    assert SPELLINGS[spelling] in keys
    assert_same(lora_files.fitted(keys, omni, OMNI), lora)


@pytest.fixture(scope="module")
def pipe():
    return tiny_z_image(n_layers=2)


@pytest.mark.parametrize("spelling", SPELLINGS)
def test_a_file_changes_the_weights_by_its_product(pipe, spelling):
    """Also where q, k and v are one layer of the file."""
    tiny = copy.deepcopy(pipe.dit).requires_grad_(False)
    lora, before = random_lora(tiny, alphas=ALPHAS), {key: one.clone() for key, one in tiny.state_dict().items()}
    fuse(tiny, fitted(written(lora, tiny, spelling), tiny), 0.5)
    assert_added(tiny, before, lora, 0.5)


def test_a_file_is_converted_to_every_spelling_and_back(pipe, tmp_path):
    lora, file = random_lora(pipe.dit, LORA_TARGETS, alphas=ALPHAS), tmp_path / "first.safetensors"
    save_file(to_state_dict(lora), file)
    for spelling, key in SPELLINGS.items():
        file = pipe.convert_lora(file, tmp_path / f"{spelling}.safetensors", spelling=spelling)
        keys = load_file(file)
        assert key in keys
        assert_same(fitted(keys, pipe.dit), lora)


def test_fused_attention_of_kohya(dit):
    """LoRAs of sd-scripts use the original code's names, where query, key and value are one layer."""
    dice, dim = torch.Generator().manual_seed(0), TINY_DIT.dim
    parts = {"attention.qkv": (3 * dim, dim), "attention.out": (dim, dim)}
    keys = {}
    for part, (outputs, inputs) in parts.items():
        name = f"lora_unet_layers_0_{part.replace('.', '_')}"
        keys |= {f"{name}.lora_down.weight": torch.randn(2, inputs, generator=dice)}
        keys |= {f"{name}.lora_up.weight": torch.randn(outputs, 2, generator=dice), f"{name}.alpha": torch.tensor(1.0)}
    ours, theirs = fitted(keys, dit), fitted(ZImageLoraLoaderMixin.lora_state_dict(dict(keys)), dit)
    block = "layers.0.attention"
    assert ours.layers.keys() == {f"{block}.{part}" for part in ("to_q", "to_k", "to_v", "to_out.0")}
    assert_same(ours, theirs)


PUBLISHED = {
    "DiffSynth-Studio/Z-Image-Turbo-DistillPatch": "{}.lora_{side}.default.weight",
    "ostris/zimage_turbo_training_adapter": "diffusion_model.{}.lora_{side}.weight",
}
"""Published LoRA -> the spelling of its keys: that of DiffSynth-Studio, and that of ai-toolkit."""


@pytest.mark.parametrize("repository", PUBLISHED)
def test_published_loras_are_ordinary_ones(repository):
    """On the linear layers of all blocks and refiners, strength 1 without an alpha; fused and hot are the same."""
    pipe = tiny_z_image(n_layers=2)
    targets = target_layers(pipe.dit, LORA_TARGETS)
    assert len(targets) == 7 * 4
    made = random_lora(pipe.dit, LORA_TARGETS, rank=2).layers
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
    module = component.build(DIT, ZImageDiTConfig())
    keys = {key: torch.zeros(shape) for key, shape in FILES[name].items()}
    try:
        fit(parse(keys), module, checkpoints, architecture="z_image_dit")
        loads = True
    except KeyMismatch:
        loads = False
    sent = "Load that model, then " in said
    assert sent == loads, said
    assert ("load_lora refuses it" in said or "another size" in said) == (not loads), said
