"""Cached keys and values of reference images: whole calls equal diffusers' (0.42), with and without the cache."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from diffusers import Flux2KleinKVPipeline
from PIL import Image

from diffsynth_flux.flux2.extension import image_positions, text_positions
from diffsynth_flux.flux2.features.reference_cache import MoreKeysValues, RecordReferences
from flux2_oracles import SIZE, noise, packed, tiny_pipelines
from parity import TOLERANCE, relative_error

STEPS = {"num_inference_steps": 4, **SIZE}


@pytest.fixture(scope="module")
def pair():
    ours, parts = tiny_pipelines(klein=True)
    parts.pop("is_distilled")
    oracle = Flux2KleinKVPipeline(**parts)
    oracle.set_progress_bar_config(disable=True)
    return ours, oracle


def images(count: int) -> list[Image.Image]:
    sizes = [(64, 80), (96, 64), (64, 64)][:count]
    random = np.random.default_rng(0)
    return [Image.fromarray(random.integers(0, 255, (*size, 3), dtype=np.uint8)) for size in sizes]


@pytest.mark.parametrize("count", [1, 3])
def test_equals_diffusers(pair, count: int) -> None:
    ours, oracle = pair
    several = images(count)
    layers = {"text_encoder_out_layers": (1, 2, 3)}
    out = oracle(prompt="a hat", image=several, latents=noise(2), output_type="latent", **layers, **STEPS).images
    call = {"edit_image": several, "edit_image_auto_resize": False, "seed": 2, "output_type": "latents", **STEPS}
    latents = ours("a hat", edit_image_kv_cache=True, **call)
    assert relative_error(latents, packed(out, oracle.vae)) < TOLERANCE
    assert relative_error(ours("a hat", **call), latents) > 1e-3, "another attention than without"


def test_equals_a_call_that_computes_the_references_in_every_step(pair) -> None:
    """The oracle runs the whole sequence in each step, with the references at level 0."""
    ours, oracle = pair
    (image,) = images(1)
    call = {"edit_image": image, "edit_image_auto_resize": False, "seed": 2, "output_type": "latents", **STEPS}
    steps: list[tuple[float, float]] = []
    latents = ours("a hat", edit_image_kv_cache=True, on_step=lambda s: steps.append((s.sigma, s.sigma_next)), **call)
    with torch.no_grad():
        pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1)[None].float() / 127.5 - 1
        reference = packed(oracle.vae.encode(pixels).latent_dist.mode(), oracle.vae)
        embeds, _ = oracle.encode_prompt("a hat", text_encoder_out_layers=(1, 2, 3))
        x, ids = noise(2), [image_positions(tuple(reference.shape[2:]), time=10), image_positions((5, 3))]
        for sigma, sigma_next in steps:
            velocity = oracle.transformer(
                hidden_states=torch.cat([reference.flatten(2).mT, x.flatten(2).mT], dim=1),
                encoder_hidden_states=embeds,
                timestep=torch.tensor([sigma]),
                img_ids=torch.cat(ids)[None],
                txt_ids=text_positions(embeds.shape[1])[None],
                kv_cache_mode="extract",
                num_ref_tokens=reference[0, 0].numel(),
            ).sample
            x = x + (sigma_next - sigma) * velocity.mT.reshape(x.shape)
    assert relative_error(latents, x) < TOLERANCE


@torch.no_grad()
def test_all_blocks_attend_by_the_same_function_of_tensors(pair) -> None:
    """torch.compile makes one graph for all blocks then; one for each block would reach its limit of 8."""
    dit = pair[0].dit
    image = torch.randn(1, dit.config.in_channels, 2, 2)
    stream = dit.embed(image, torch.zeros(1), torch.zeros(1, 1, dit.config.prompt_dim))
    record = RecordReferences({10: image})
    blocks = [(stack, n) for stack in ("transformer_blocks", "single_transformer_blocks") for n in range(2)]
    attends = [record(dit, stream).attend(block) for block in blocks]
    assert len({each.func for each in attends}) == 1
    assert [each.args for each in attends] == [([], 1)] * 4
    dit(image, torch.zeros(1), torch.zeros(1, 1, dit.config.prompt_dim), extensions=(record,))
    attends = [MoreKeysValues(record.recorded)(dit, stream).attend(block) for block in blocks]
    assert len({each.func for each in attends}) == 1
    assert all(isinstance(value, torch.Tensor) for each in attends for value in each.args[1:])
