"""LoRAs of Qwen-Image: every program's file as diffusers 0.42.1 converts it, the weights they make, and whole calls."""

from __future__ import annotations

import copy
from dataclasses import replace

import pytest
import torch
from diffusers import QwenImagePipeline as Oracle
from diffusers.loaders.lora_pipeline import QwenImageLoraLoaderMixin
from safetensors.torch import load_file, save_file

import lora_files
from diffsynth.core.loader import component
from diffsynth.core.lora import LoRA, fuse, save_lora, target_layers
from diffsynth.core.lora.format import to_state_dict
from diffsynth_qwen_image.checkpoints import ARCHITECTURES, LORA_TARGETS
from diffsynth_qwen_image.config import TINY_DIT
from lora_files import ALPHAS, assert_added, assert_same, random_lora
from parity import TOLERANCE, relative_error
from qwen_image_oracles import SIZE, noise, packed, tiny_pipelines, unpacked

DIT = ARCHITECTURES[0]
SPELLINGS = {
    "ai-toolkit": "diffusion_model.transformer_blocks.0.attn.to_q.lora_A.weight",
    "comfyui": "diffusion_model.transformer_blocks.0.attn.to_q.lora_down.weight",
    "diffusers": "transformer.transformer_blocks.0.attn.to_q.lora_A.weight",
    "kohya": "lora_unet_transformer_blocks_0_attn_to_q.lora_down.weight",
    "lightx2v": "transformer_blocks.0.attn.to_q.lora_down.weight",
    "peft": "base_model.model.transformer_blocks.0.attn.to_q.lora_A.weight",
}
"""Spelling -> one of its keys."""

ONE = {"num_inference_steps": 1, "output_type": "latents", "seed": 3, **SIZE}


@pytest.fixture(scope="module")
def dit():
    return component.build(DIT, TINY_DIT)


@pytest.fixture(scope="module")
def pair():
    return tiny_pipelines()


def fitted(state_dict, module):
    return lora_files.fitted(state_dict, module, DIT)


def written(lora, module, spelling):
    return lora_files.written(lora, module, DIT, spelling)


def test_targets_are_those_of_the_reference(dit):
    names = target_layers(dit, LORA_TARGETS)
    block = {name.removeprefix("transformer_blocks.0.") for name in names if name.startswith("transformer_blocks.0.")}
    assert {"img_mlp.net.2", "txt_mlp.net.2", "img_mod.1", "txt_mod.1", "attn.to_out.0", "attn.to_add_out"} < block
    assert len(names) == 12 * TINY_DIT.n_layers


@pytest.mark.parametrize("alphas", [(None,), ALPHAS], ids=["none", "each"])
@pytest.mark.parametrize("spelling", SPELLINGS)
def test_diffusers_reads_what_we_write_and_we_read_what_it_makes(dit, spelling, alphas):
    """All linear layers, also those that `LORA_TARGETS` has not; alphas differ from layer to layer."""
    lora = random_lora(dit, alphas=alphas)
    keys = written(lora, dit, spelling)
    assert SPELLINGS[spelling] in keys
    assert_same(fitted(keys, dit), lora)
    theirs = QwenImageLoraLoaderMixin.lora_state_dict(dict(keys))
    assert not any("alpha" in key for key in theirs)
    if spelling != "peft":  # which diffusers leaves as it is
        assert theirs.keys() == {f"transformer.{name}.lora_{side}.weight" for name in lora.layers for side in "AB"}
    assert_same(fitted(theirs, dit), lora)


@pytest.mark.parametrize("alphas", [(None,), ALPHAS], ids=["none", "each"])
def test_diffusers_reads_what_we_save(dit, alphas, tmp_path):
    lora = random_lora(dit, LORA_TARGETS, alphas=alphas)
    theirs = QwenImageLoraLoaderMixin.lora_state_dict(load_file(save_lora(lora, tmp_path / "a.safetensors")))
    assert_same(fitted(theirs, dit), lora)


def test_names_of_diffsynth_studio(dit):
    lora = random_lora(dit, LORA_TARGETS)
    keys = {key.replace(".weight", ".default.weight"): tensor for key, tensor in to_state_dict(lora).items()}
    for each in (keys, {f"diffusion_model.{key}": tensor for key, tensor in keys.items()}):
        assert_same(fitted(each, dit), lora)
        assert_same(fitted(QwenImageLoraLoaderMixin.lora_state_dict(dict(each)), dit), lora)


@pytest.mark.parametrize("spelling", SPELLINGS)
def test_a_file_changes_the_weights_by_its_product(pair, spelling):
    tiny = copy.deepcopy(pair[0].dit).requires_grad_(False)
    lora, before = random_lora(tiny, alphas=ALPHAS), {key: one.clone() for key, one in tiny.state_dict().items()}
    fuse(tiny, fitted(written(lora, tiny, spelling), tiny), 0.5)
    assert_added(tiny, before, lora, 0.5)


@pytest.mark.parametrize("spelling", ["lightx2v", "kohya"])
@torch.no_grad()
def test_a_call_with_a_file_is_that_of_diffusers(pair, spelling):
    """Four steps, with the LoRA beside the weights here and in the adapters of peft there."""
    ours, parts = pair
    lora = random_lora(ours.dit, LORA_TARGETS, alphas=ALPHAS)
    lora = LoRA({name: replace(layer, down=layer.down / 16) for name, layer in lora.layers.items()})
    keys = written(lora, ours.dit, spelling)
    oracle = Oracle(**parts | {"transformer": copy.deepcopy(parts["transformer"])})
    oracle.set_progress_bar_config(disable=True)
    oracle.load_lora_weights(dict(keys))
    embeds = ours.run_units(ours.condition_units(), {"prompt": ["a cat"]})["prompt_embeds"]
    start = {"latents": packed(noise(3)), "output_type": "latent", "true_cfg_scale": 1.0}
    expected = unpacked(oracle(prompt_embeds=embeds, num_inference_steps=4, **start, **SIZE).images)
    call = ONE | {"num_inference_steps": 4, "cfg_scale": 1}
    plain = ours("a cat", **call)
    ours.load_lora(ours.dit, state_dict=keys, hotload=True)
    try:
        assert relative_error(ours("a cat", **call), expected) < TOLERANCE
    finally:
        ours.clear_lora()
    assert relative_error(plain, expected) > 1e-2
    assert torch.equal(ours("a cat", **call), plain)


def test_a_file_is_converted_to_every_spelling_and_back(pair, tmp_path):
    ours, _ = pair
    lora = random_lora(ours.dit, LORA_TARGETS, alphas=ALPHAS)
    file = tmp_path / "lightning.safetensors"
    save_file(written(lora, ours.dit, "lightx2v"), file)
    for spelling, key in SPELLINGS.items():
        file = ours.convert_lora(file, tmp_path / f"{spelling}.safetensors", spelling=spelling)
        keys = load_file(file)
        assert key in keys
        assert_same(fitted(keys, ours.dit), lora)


def style(module, seed, spelling="diffusers"):
    lora = random_lora(module, (f"{seed}.attn.to_q", f"{seed}.img_mlp.net.2"), alphas=ALPHAS)
    return written(lora, module, spelling)


def test_loras_are_exchanged_between_calls(pair):
    """Each call has the bits of the first with the same LoRAs, whatever was loaded between."""
    ours, _ = pair
    one, two = style(ours.dit, 0, "lightx2v"), style(ours.dit, 1, "kohya")
    found = {}
    for names in ((), (1,), (2,), (1, 2), (1,), ()):
        for name in names:
            ours.load_lora(ours.dit, state_dict={1: one, 2: two}[name], hotload=True, verbose=0)
        latents = ours("a", **ONE, cfg_scale=1)
        ours.clear_lora()
        assert torch.equal(latents, found.setdefault(names, latents))
    assert len(found) == 4
    assert all(relative_error(found[names], found[()]) > 1e-3 for names in found if names)
    assert relative_error(found[1, 2], found[(1,)]) > 1e-3


def test_each_branch_of_guidance_has_its_own(pair, tmp_path):
    """One step of guidance is linear in the two velocities, which calls without guidance give one by one. A LoRA that
    is loaded is added in both branches.
    """
    ours, _ = pair
    one, two = (save_lora(style(ours.dit, index), tmp_path / f"{index}.safetensors") for index in (0, 1))
    call, loaded = {"negative_prompt": "b", "cfg_scale": 2.5, **ONE}, style(ours.dit, 0)
    plain = ours("a hat", **call)
    for positive, negative in ((two, None), (None, one), (one, two)):
        found = ours("a hat", **call, positive_only_lora=positive, negative_only_lora=negative)
        cond = ours("a hat", **ONE, cfg_scale=1, positive_only_lora=positive)
        uncond = ours("b", **ONE, cfg_scale=1, positive_only_lora=negative)
        assert relative_error(found, uncond + 2.5 * (cond - uncond)) < 1e-4
        assert relative_error(found, plain) > 1e-3
    assert torch.equal(ours("a hat", **call), plain)
    ours.load_lora(ours.dit, state_dict=loaded, hotload=True, verbose=0)
    try:
        both = ours("a hat", **call, positive_only_lora=two)
        cond, uncond = ours("a hat", **ONE, cfg_scale=1, positive_only_lora=two), ours("b", **ONE, cfg_scale=1)
        assert relative_error(both, uncond + 2.5 * (cond - uncond)) < 1e-4
    finally:
        ours.clear_lora()
    assert torch.equal(ours("a hat", **call), plain)
