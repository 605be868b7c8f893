"""Outputs of template models as arguments of whole calls: keys and values, tokens after the prompt's, a LoRA."""

from __future__ import annotations

import threading

import numpy as np
import pytest
import torch
from diffusers import Flux2KleinPipeline
from PIL import Image

from diffsynth.core.lora import LoRA, LoRALayer
from diffsynth.core.lora.format import to_state_dict
from diffsynth.errors import KeyMismatch
from diffsynth_flux.flux2.features.reference_cache import RecordReferences
from flux2_oracles import SIZE, noise, packed, tiny_pipelines
from parity import TOLERANCE, relative_error

STEPS = {"num_inference_steps": 4, "output_type": "latents", "seed": 3, **SIZE}
ONE = {"num_inference_steps": 1, "output_type": "latents", "seed": 3, "height": 32, "width": 48}
NAMES = {"transformer_blocks": "double", "single_transformer_blocks": "single"}


@pytest.fixture(scope="module")
def pair():
    ours, parts = tiny_pipelines(klein=True)
    oracle = Flux2KleinPipeline(**parts)
    oracle.set_progress_bar_config(disable=True)
    return ours, oracle


@pytest.fixture(scope="module")
def ours(pair):
    return pair[0]


def drawn_lora(dit, seed: int = 0) -> dict[str, torch.Tensor]:
    dice = torch.Generator().manual_seed(seed)
    layers = {}
    for name in ("transformer_blocks.0.attn.to_q", "single_transformer_blocks.1.attn.to_out", "x_embedder"):
        outputs, inputs = dit.get_submodule(name).weight.shape
        layers[name] = LoRALayer(torch.randn(2, inputs, generator=dice), torch.randn(outputs, 2, generator=dice), 1.0)
    return to_state_dict(LoRA(layers))


def drawn_cache(dit, seed: int = 0, tokens: int = 5) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    dice, heads = torch.Generator().manual_seed(seed), (dit.config.n_heads, dit.config.head_dim)
    names = ("double_1", "single_0")
    return {name: tuple(torch.randn(1, tokens, *heads, generator=dice) for _ in range(2)) for name in names}


@torch.no_grad()
def test_keys_and_values_of_references_are_those_of_the_cache_of_reference_images(ours):
    image = Image.fromarray(np.random.default_rng(0).integers(0, 255, (64, 80, 3), dtype=np.uint8))
    call = {"edit_image": image, "edit_image_auto_resize": False, "edit_image_kv_cache": True, **STEPS}
    expected = ours("a hat", **call)
    pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1)[None].float() / 127.5 - 1
    latents = ours.vae.encode(pixels)
    record = RecordReferences({10: latents})
    width = ours.dit.config.prompt_dim
    ours.dit(latents, torch.zeros(1), torch.zeros(1, 1, width), None, extensions=[record])
    cache = {f"{NAMES[stack]}_{index}": tuple(kept) for (stack, index), kept in record.recorded.items()}
    assert sorted(cache) == ["double_0", "double_1", "single_0", "single_1"]
    assert relative_error(ours("a hat", kv_cache=cache, **STEPS), expected) < 1e-5
    part = {name: kept for name, kept in cache.items() if name != "single_1"}
    assert relative_error(ours("a hat", kv_cache=part, **STEPS), expected) > 1e-3


@pytest.mark.parametrize("cfg_scale", [1.0, 3.0])
@torch.no_grad()
def test_tokens_after_those_of_the_prompt_equal_diffusers(pair, cfg_scale):
    ours, oracle = pair
    extra = torch.randn(1, 6, ours.dit.config.prompt_dim, generator=torch.Generator().manual_seed(1))
    layers = {"text_encoder_out_layers": (1, 2, 3)}
    text = {
        name: torch.cat((oracle.encode_prompt(text, **layers)[0], sign * extra), dim=1)
        for name, text, sign in (("prompt_embeds", "a hat", 1), ("negative_prompt_embeds", "", -1))
    }
    given = {name: value for name, value in STEPS.items() if name not in ("seed", "output_type")}
    out = oracle(**text, guidance_scale=cfg_scale, latents=noise(3), output_type="latent", **layers, **given).images
    found = ours(
        "a hat", extra_text_embedding=extra, negative_extra_text_embedding=-extra, cfg_scale=cfg_scale, **STEPS
    )
    assert relative_error(found, packed(out, oracle.vae)) < TOLERANCE
    assert relative_error(ours("a hat", cfg_scale=cfg_scale, **STEPS), found) > 1e-3


def test_a_lora_of_a_call_is_the_loaded_one_to_the_bit_and_leaves_nothing(ours):
    lora = drawn_lora(ours.dit)
    plain = ours("a hat", **ONE)
    found = ours("a hat", lora=lora, **ONE)
    assert torch.equal(ours("a hat", **ONE), plain)
    ours.load_lora(ours.dit, state_dict=lora, hotload=True)
    try:
        assert torch.equal(ours("a hat", **ONE), found)
        assert relative_error(found, plain) > 1e-3
        other = drawn_lora(ours.dit, seed=1)
        both = ours("a hat", lora=other, **ONE)
    finally:
        ours.clear_lora()
    assert relative_error(both, found) > 1e-3
    assert relative_error(both, ours("a hat", lora=other, **ONE)) > 1e-3


@pytest.mark.parametrize("name", ["lora", "kv_cache", "extra_text_embedding"])
def test_each_branch_of_guidance_has_its_own(ours, name):
    """One step of guidance is linear in the two velocities, which calls without guidance give one by one."""
    made = {
        "lora": lambda seed: drawn_lora(ours.dit, seed),
        "kv_cache": lambda seed: drawn_cache(ours.dit, seed),
        "extra_text_embedding": lambda seed: torch.randn(
            1, 4, ours.dit.config.prompt_dim, generator=torch.Generator().manual_seed(seed)
        ),
    }[name]
    one, two = made(1), made(2)
    for positive, negative in ((one, None), (None, two), (one, two)):
        found = ours(
            "a hat", negative_prompt="b", cfg_scale=2.5, **ONE, **{name: positive, f"negative_{name}": negative}
        )
        cond, uncond = ours("a hat", **ONE, **{name: positive}), ours("b", **ONE, **{name: negative})
        assert relative_error(found, uncond + 2.5 * (cond - uncond)) < 1e-4
        assert relative_error(found, ours("a hat", negative_prompt="b", cfg_scale=2.5, **ONE)) > 1e-3


def test_several_results_get_the_same(ours):
    given = {"lora": drawn_lora(ours.dit), "kv_cache": drawn_cache(ours.dit)}
    both = ours(["a", "b"], **{**ONE, "seed": [1, 2]}, **given)
    alone = [ours(text, **{**ONE, "seed": seed}, **given) for text, seed in (("a", 1), ("b", 2))]
    assert relative_error(both, torch.cat(alone)) < TOLERANCE


def test_a_lora_of_a_call_is_for_its_thread_alone(ours):
    """A second call runs whole while the first is between two of its steps, and while it computes one."""
    lora, found = drawn_lora(ours.dit), {}
    plain, changed = ours("a", **ONE), ours("a", lora=lora, **ONE)
    entered, done = threading.Event(), threading.Event()
    layer = ours.dit.get_submodule("single_transformer_blocks.0")
    first = threading.get_ident()

    def wait(module, inputs):
        if threading.get_ident() == first and not done.is_set():
            entered.set()
            done.wait(60)

    def other():
        entered.wait(60)
        found["plain"] = ours("a", **ONE)
        done.set()

    handle, thread = layer.register_forward_pre_hook(wait), threading.Thread(target=other)
    try:
        thread.start()
        assert torch.equal(ours("a", lora=lora, **ONE), changed)
        thread.join()
    finally:
        handle.remove()
    assert torch.equal(found["plain"], plain)


@pytest.mark.parametrize(
    ("arguments", "kind", "message"),
    [
        (
            {"kv_cache": {"double_2": ()}},
            ValueError,
            "kv_cache has 'double_2', .* double_0 to double_1 .* did you mean",
        ),
        ({"kv_cache": {"double_0": torch.zeros(1)}}, TypeError, r"kv_cache\['double_0'\] is Tensor; expected a tuple"),
        (
            {"negative_kv_cache": {"single_0": (torch.zeros(1, 3, 2, 8),) * 2}},
            ValueError,
            r"negative_kv_cache\['single_0'\] has the shapes \(1, 3, 2, 8\) .* expected two of \(1, tokens, 2, 16\)",
        ),
        ({"extra_text_embedding": torch.zeros(1, 3, 7)}, ValueError, r"\(1, 3, 7\); expected \(1, tokens, 48\)"),
        ({"lora": {"nothing": torch.zeros(2)}}, KeyMismatch, "LoRA"),
    ],
)
def test_what_does_not_fit_is_refused_before_anything_runs(ours, arguments, kind, message):
    with pytest.raises(kind, match=message):
        ours.check(prompt="a", **arguments)


def test_a_negative_side_without_guidance_is_logged(ours):
    reasons = ours.arguments_without_effect(prompt="a", negative_lora=drawn_lora(ours.dit))
    assert reasons == {"negative_lora": "guidance is off (cfg_scale=1.0)"}
