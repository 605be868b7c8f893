"""Prompts of regions: the mask against loops, whole calls against diffusers' network with that mask, limit cases."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
import torch
from diffusers.models.transformers import transformer_qwenimage
from PIL import Image

import parity
from diffsynth.core.attention import attention
from diffsynth_qwen_image.config import TINY_DIT
from diffsynth_qwen_image.dit import QwenImageDiT
from diffsynth_qwen_image.features.eligen import (
    Entities,
    Texts,
    entity_mask,
    regions_of_grids,
    token_region,
)
from diffsynth_qwen_image.units import encode_prompt, schedule
from parity import TOLERANCE, relative_error
from qwen_image_oracles import SIZE, noise, packed, tiny_pipelines, unpacked

GRID = (5, 3)
"""Rows and columns of the tokens of `SIZE`."""

STEPS = {"num_inference_steps": 4, "output_type": "latents", "seed": 7, **SIZE}
ONE = {**STEPS, "num_inference_steps": 1}
PROMPTS = ["a red hat", "b"]


def painted(box, size=(48, 80)) -> Image.Image:
    image = Image.new("L", size)
    image.paste(255, box)
    return image


MASKS = [painted((0, 0, 20, 80)), painted((16, 40, 48, 70))]
WIDE = painted((0, 0, 20, 16), (96, 16))
"""Mask that covers the first column of tokens where it is stretched, and none where it is cropped."""

ENTITIES = {"eligen_entity_prompts": PROMPTS, "eligen_entity_masks": MASKS}


def mask_by_loops(lengths, regions):
    """Return the mask of texts and an image; each text has its region, the prompt all of it."""
    owners = [text for text, length in enumerate(lengths) for _ in range(length)]
    owners += [None] * regions.shape[1]
    first = sum(lengths)
    found = torch.zeros(len(owners), len(owners), dtype=torch.bool)
    for query, one in enumerate(owners):
        for key, other in enumerate(owners):
            texts = {text for text in (one, other) if text is not None}
            if len(texts) == 2:
                continue
            token = next((place - first for place in (query, key) if place >= first), None)
            (text,) = texts or (None,)
            is_inside = text in (None, 0) or token is None or bool(regions[text - 1, token])
            found[query, key] = is_inside
    return found


def regions_by_loops(masks):
    """Return the tokens of which a latent pixel is white: that under the middle of it, as PIL scales to the nearest."""
    rows, columns = GRID
    found = torch.zeros(len(masks), rows, columns, dtype=torch.bool)
    for index, mask in enumerate(masks):
        for row in range(2 * rows):
            for column in range(2 * columns):
                x, y = (column + 0.5) * mask.width / (2 * columns), (row + 0.5) * mask.height / (2 * rows)
                found[index, row // 2, column // 2] |= mask.getpixel((int(x), int(y))) >= 128
    return found


def test_the_mask_is_that_of_loops() -> None:
    regions = torch.rand(2, 15, generator=torch.Generator().manual_seed(0)) < 0.5
    for lengths in ((3, 2, 4), (1, 1, 1)):
        assert torch.equal(entity_mask(lengths, regions)[0, 0], mask_by_loops(lengths, regions))


@pytest.mark.parametrize("size", [(48, 80), (31, 47), (100, 90)])
def test_a_token_is_in_a_region_if_a_latent_pixel_of_it_is_white(size) -> None:
    is_white = np.random.default_rng(0).random((size[1] // 4 + 1, size[0] // 4 + 1)) < 0.15
    mask = Image.fromarray(np.where(is_white, 128, 127).astype(np.uint8)).resize(size, Image.Resampling.NEAREST)
    found = token_region(mask, SIZE["height"], SIZE["width"])
    assert 0 < int(found.sum()) < found.numel()
    assert torch.equal(found, regions_by_loops([mask])[0])
    opaque = Image.new("RGBA", size, (9, 9, 9, 0))
    opaque.putalpha(mask)
    assert torch.equal(token_region(opaque, SIZE["height"], SIZE["width"]), found)
    assert token_region(WIDE, SIZE["height"], SIZE["width"]).tolist() == [[True, False, False]] * 5


def test_other_images_have_the_same_regions_scaled() -> None:
    regions = torch.zeros(1, 2, 3, dtype=torch.bool)
    regions[0, 0, 2] = True
    found = regions_of_grids(regions, ((2, 3), (2, 3), (4, 6), (1, 1)))[0]
    assert found.split((6, 6, 24, 1))[1].tolist() == regions.flatten().tolist()
    larger = found.split((6, 6, 24, 1))[2].view(4, 6)
    assert torch.equal(larger, regions[0].repeat_interleave(2, 0).repeat_interleave(2, 1))


@pytest.fixture(scope="module")
def plain():
    return tiny_pipelines()


def several(inner, lengths):
    """Return positions as those of diffusers' network, of several texts: each as if it were the only one."""

    def forward(grids, max_txt_seq_len, device):
        image, _ = inner(grids, max_txt_seq_len=1, device=device)
        return image, torch.cat([inner(grids, max_txt_seq_len=length, device=device)[1] for length in lengths])

    return forward


def oracle_velocity(oracle, monkeypatch, latents, sigma, texts, mask):
    """Return the velocity of diffusers' network for one image, with attention masked by region and the positions of
    each text as if it were alone: diffusers has no entity prompts, so both are replaced in its network.
    """
    lengths, dispatch = [text.shape[1] for text in texts], transformer_qwenimage.dispatch_attention_fn
    with monkeypatch.context() as patch:
        patch.setattr(oracle.pos_embed, "forward", several(oracle.pos_embed.forward, lengths))
        patch.setattr(
            transformer_qwenimage,
            "dispatch_attention_fn",
            lambda q, k, v, **options: dispatch(q, k, v, **options | {"attn_mask": mask}),
        )
        out = oracle(
            hidden_states=packed(latents),
            encoder_hidden_states=torch.cat(texts, dim=1),
            timestep=sigma[None],
            img_shapes=[[(1, *GRID)]],
            return_dict=False,
        )[0]
    return unpacked(out)


@pytest.mark.parametrize(
    ("cfg_scale", "on_negative"), [(1.0, False), (4.0, False), (4.0, True)], ids=["off", "positive", "both"]
)
@torch.no_grad()
def test_whole_calls_are_those_of_diffusers_network_with_the_mask(plain, cfg_scale, on_negative, monkeypatch) -> None:
    """Four steps at an odd grid; the texts come in the order of DiffSynth-Studio, the prompt behind the entities."""
    ours, parts = plain
    options = {"device": torch.device("cpu"), "dtype": torch.float32}
    encoded = {
        text: encode_prompt.function(ours.text_encoder, ours.tokenizer, prompt=text, **options)[0]
        for text in (*PROMPTS, "a cat", "blurry")
    }
    regions = regions_by_loops(MASKS).flatten(1)

    def velocity(latents, sigma, prompt, entities):
        texts = [encoded[text] for text in (prompt, *entities)]
        mask = mask_by_loops([text.shape[1] for text in texts], regions[: len(entities)])
        order = torch.arange(sum(text.shape[1] for text in texts)).roll(-texts[0].shape[1])
        order = torch.cat((order, torch.arange(len(order), len(mask))))
        texts = [*texts[1:], texts[0]]
        return oracle_velocity(parts["transformer"], monkeypatch, latents, sigma, texts, mask[order][:, order])

    latents, sigmas = noise(7), schedule.function(num_inference_steps=4, **SIZE)
    for sigma, sigma_next in pairwise(sigmas):
        guided = velocity(latents, sigma, "a cat", PROMPTS)
        if cfg_scale != 1:
            negative = velocity(latents, sigma, "blurry", ["blurry"] * 2 if on_negative else [])
            guided = negative + cfg_scale * (guided - negative)
        latents = latents + (sigma_next - sigma) * guided
    call = {"prompt": "a cat", "negative_prompt": "blurry", "cfg_scale": cfg_scale, **STEPS}
    found = ours(**call, **ENTITIES, eligen_enable_on_negative=on_negative)
    assert relative_error(found, latents) < TOLERANCE
    assert relative_error(ours(**call), latents) > 1e-2
    if cfg_scale != 1:
        assert relative_error(ours(**call, **ENTITIES, eligen_enable_on_negative=not on_negative), latents) > 1e-3


def built(**changes) -> QwenImageDiT:
    dit = QwenImageDiT(replace(TINY_DIT, **changes)).eval()
    dit.load_state_dict(parity.draw_weights(parity.shapes_of(dit)))
    return dit


def drawn(length=7, batch=1, seed=0) -> torch.Tensor:
    return torch.randn(batch, length, TINY_DIT.prompt_dim, generator=torch.Generator().manual_seed(seed))


def drawn_inputs(**changes):
    latents = torch.randn(1, 16, 10, 6, generator=torch.Generator().manual_seed(5))
    return {"latents": latents, "sigma": torch.tensor([0.6]), "prompt_embeds": drawn(), **changes}


def entities(*texts, regions) -> Entities:
    return Entities(Texts(texts, (None,) * len(texts)), regions)


ALL = torch.ones(1, *GRID, dtype=torch.bool)
LEFT = torch.zeros(1, *GRID, dtype=torch.bool).index_fill(2, torch.tensor([0]), True)


@torch.no_grad()
def test_the_prompt_in_a_region_of_the_whole_image_counts_twice() -> None:
    """It is no call without entities: the image's softmax has each key of the text two times, and the text once. The
    two texts, which have the same positions and attend to the same, stay equal in every block.
    """
    dit = built()

    def twice(dit, stream):
        length = stream.text.shape[1]

        def attend(q, k, v, mask):
            image = attention(q[:, length:], *(torch.cat((x[:, :length], x), dim=1) for x in (k, v)))
            return torch.cat((attention(q[:, :length], k, v), image), dim=1)

        return replace(stream, attend=lambda block: attend)

    found = dit(**drawn_inputs(), extensions=[entities(drawn(), regions=ALL)])
    assert relative_error(found, dit(**drawn_inputs(), extensions=[twice])) < 1e-5
    assert relative_error(found, dit(**drawn_inputs())) > 1e-3


@torch.no_grad()
def test_an_entity_without_a_region_changes_nothing() -> None:
    dit, inputs = built(), drawn_inputs()
    found = dit(**inputs, extensions=[entities(drawn(4, seed=1), regions=~ALL)])
    assert relative_error(found, dit(**inputs)) < 1e-5


@torch.no_grad()
def test_a_block_changes_the_tokens_of_the_region_alone() -> None:
    """Later blocks carry it on, as the image attends to itself."""
    dit, inputs = built(n_layers=1), drawn_inputs()
    found = dit(**inputs, extensions=[entities(drawn(4, seed=1), regions=LEFT)])
    change = (found - dit(**inputs)).abs().amax(dim=1)[0]
    assert float(change[:, 2:].max()) < 1e-5
    assert float(change[:, :2].amin()) > 1e-4
    deep = built()
    change = deep(**inputs, extensions=[entities(drawn(4, seed=1), regions=LEFT)]) - deep(**inputs)
    assert float(change[..., 2:].abs().max()) > 1e-4


@torch.no_grad()
def test_the_order_of_entities_does_not_matter() -> None:
    dit, one, two = built(), drawn(4, seed=1), drawn(2, seed=2)
    found = dit(**drawn_inputs(), extensions=[entities(one, two, regions=torch.cat((LEFT, ~LEFT)))])
    other = dit(**drawn_inputs(), extensions=[entities(two, one, regions=torch.cat((~LEFT, LEFT)))])
    assert relative_error(found, other) < 1e-5
    swapped = dit(**drawn_inputs(), extensions=[entities(two, one, regions=torch.cat((LEFT, ~LEFT)))])
    assert relative_error(found, swapped) > 1e-3


@torch.no_grad()
def test_entities_beside_references() -> None:
    """An image that is appended after the entities attends to all; one before them has their regions, too."""
    dit, reference = built(), torch.randn(1, 16, 10, 6, generator=torch.Generator().manual_seed(9))
    named = entities(drawn(4, seed=1), regions=LEFT)

    def append(dit, stream):
        return dit.append_images(stream, [reference])

    first, last = (dit(**drawn_inputs(), extensions=order) for order in ([append, named], [named, append]))
    assert relative_error(first, last) > 1e-4
    everywhere = entities(drawn(4, seed=1), regions=ALL)
    both = [dit(**drawn_inputs(), extensions=order) for order in ([append, everywhere], [everywhere, append])]
    assert relative_error(*both) < 1e-5


def test_gradients_stay_in_the_region() -> None:
    """Those of a network of one block; recomputing activations changes none of them."""
    dit, text = built(n_layers=1), drawn(4, seed=1).requires_grad_()
    dit.requires_grad_(True)
    made = []
    for checkpointing in (False, True):
        dit.gradient_checkpointing = checkpointing
        out = dit(**drawn_inputs(), extensions=[entities(text, regions=LEFT)])
        (outside,) = torch.autograd.grad(out[..., 2:].square().sum(), text, retain_graph=True)
        assert not outside.any()
        inside, weight = torch.autograd.grad(
            out.square().sum(), [text, dit.transformer_blocks[0].attn.add_k_proj.weight]
        )
        assert bool(inside.abs().amax(dim=-1).gt(0).all())
        made.append((inside, weight))
    for plain, again in zip(*made, strict=True):
        assert torch.equal(plain, again)


def test_results_of_one_call_are_those_of_several(plain) -> None:
    """Prompts of different lengths are padded; the entities are those of every result."""
    ours, _ = plain
    call = {**ONE, **ENTITIES, "cfg_scale": 4.0, "eligen_enable_on_negative": True}
    pairs = [("a", 1, "bad"), ("a cat on a red mat", 2, "blurry")]
    singles = [ours(text, **call | {"seed": seed}, negative_prompt=negative) for text, seed, negative in pairs]
    texts, seeds, negatives = (list(each) for each in zip(*pairs, strict=True))
    batch = ours(texts, **call | {"seed": seeds}, negative_prompt=negatives)
    assert relative_error(batch, torch.cat(singles)) < TOLERANCE
    two = ours("a", **call | {"seed": 1}, negative_prompt="bad", num_images=2)
    assert relative_error(two[:1], singles[0]) < TOLERANCE


def test_arguments_of_no_effect_and_neutral_values(plain) -> None:
    ours, _ = plain
    assert torch.equal(ours("a", eligen_entity_prompts=None, eligen_entity_masks=None, **ONE), ours("a", **ONE))
    reasons = ours.arguments_without_effect(prompt="a", cfg_scale=1, eligen_enable_on_negative=True, **ENTITIES)
    assert reasons == {"eligen_enable_on_negative": "guidance is off (cfg_scale=1)"}
    reasons = ours.arguments_without_effect(prompt="a", eligen_enable_on_negative=True)
    assert reasons == {"eligen_enable_on_negative": "eligen_entity_prompts is not given"}


def test_a_call_is_planned_with_its_entities(plain) -> None:
    ours, _ = plain
    plan = ours.plan(device="cuda", vram_limit=8, num_inference_steps=1, cfg_scale=1, **SIZE, **ENTITIES)
    assert [stage.name for stage in plan.stages] == ["encode_prompt", "encode_entities", "denoise", "decode_image"]


@pytest.mark.parametrize(
    ("arguments", "kind", "message"),
    [
        (
            {"eligen_entity_prompts": ["a", "b"], "eligen_entity_masks": MASKS[:1]},
            ValueError,
            "eligen_entity_prompts has 2 texts and eligen_entity_masks 1 images; expected one mask for each prompt",
        ),
        ({"eligen_entity_masks": MASKS}, ValueError, "has 0 texts and eligen_entity_masks 2 images"),
        (
            ENTITIES | {"eligen_entity_masks": [MASKS[0], Image.new("RGB", (9, 9))]},
            ValueError,
            r"eligen_entity_masks\[1\], of 9x9 pixels, covers nothing of the result of 48x80; expected white pixels",
        ),
        (
            ENTITIES | {"eligen_entity_masks": [MASKS[0], WIDE], "resize_mode": "crop"},
            ValueError,
            r"eligen_entity_masks\[1\], of 96x16 pixels, covers nothing",
        ),
        (ENTITIES | {"eligen_entity_masks": [np.ones((9, 9))] * 2}, TypeError, "of a PIL image or None .entry 0"),
        (ENTITIES | {"eligen_entity_masks": MASKS[0]}, TypeError, "expected a list of a PIL image .*list of images"),
        (ENTITIES | {"eligen_entity_prompts": "a"}, ValueError, "eligen_entity_prompts='a': expected a list of text"),
        (ENTITIES | {"eligen_entity_prompts": [3, "a"]}, ValueError, "entry 0, 3, is int"),
    ],
)
def test_what_does_not_fit_is_refused_before_anything_runs(plain, arguments, kind, message) -> None:
    ours, _ = plain
    with pytest.raises(kind, match=message):
        ours.check(prompt="a", **SIZE, **arguments)
