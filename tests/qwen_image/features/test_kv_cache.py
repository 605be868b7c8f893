"""Keys and values that blocks of Qwen-Image also attend to: those of an image beside it, and in whole calls."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

import parity
from diffsynth.core.attention import attention
from diffsynth.models.keys_values import MoreKeysValues
from diffsynth_qwen_image.config import TINY_DIT
from diffsynth_qwen_image.dit import QwenImageDiT
from parity import TOLERANCE, relative_error
from qwen_image_oracles import DIT, SIZE, tiny_pipelines

ONE = {"num_inference_steps": 1, "output_type": "latents", "seed": 3, **SIZE}


def drawn_cache(seed: int = 0, tokens: int = 5, batch: int = 1):
    dice, shape = torch.Generator().manual_seed(seed), (batch, tokens, DIT.n_heads, DIT.head_dim)
    return {f"block_{index}": tuple(torch.randn(shape, generator=dice) for _ in range(2)) for index in (0, 1)}


@pytest.fixture(scope="module")
def ours():
    return tiny_pipelines()[0]


@pytest.mark.parametrize("padded", [False, True])
@torch.no_grad()
def test_those_of_an_appended_image_are_the_image(padded) -> None:
    """In a network of one block no other token sees what the block makes of the image."""
    dit = QwenImageDiT(replace(TINY_DIT, n_layers=1)).eval()
    dit.load_state_dict(parity.draw_weights(parity.shapes_of(dit)))
    dice = torch.Generator().manual_seed(0)
    reference, latents = (torch.randn(count, 16, 10, 6, generator=dice) for count in (1, 2))
    inputs = {"latents": latents, "sigma": torch.tensor([0.4, 0.4])}
    inputs["prompt_embeds"] = torch.randn(2, 7, TINY_DIT.prompt_dim, generator=dice)
    inputs["prompt_mask"] = torch.arange(7) < torch.tensor([[7], [4]]) if padded else None
    recorded = []

    def record(q, k, v, mask):
        recorded.extend(x[:1, -15:] for x in (k, v))
        return attention(q, k, v, mask=mask)

    def append(dit, stream):
        return replace(dit.append_images(stream, [reference]), attend=lambda block: record)

    expected = dit(**inputs, extensions=[append])
    found = dit(**inputs, extensions=[MoreKeysValues({("transformer_blocks", 0): recorded})])
    assert relative_error(found, expected) < 1e-5
    assert relative_error(dit(**inputs), expected) > 1e-3


def test_each_branch_of_guidance_has_its_own(ours) -> None:
    """One step of guidance is linear in the two velocities, which calls without guidance give one by one."""
    one, two = drawn_cache(1), {"block_1": drawn_cache(2)["block_1"]}
    for positive, negative in ((one, None), (None, two), (one, two)):
        call = {"negative_prompt": "b", "cfg_scale": 2.5, **ONE}
        found = ours("a hat", **call, kv_cache=positive, negative_kv_cache=negative)
        cond = ours("a hat", **ONE, cfg_scale=1, kv_cache=positive)
        uncond = ours("b", **ONE, cfg_scale=1, kv_cache=negative)
        assert relative_error(found, uncond + 2.5 * (cond - uncond)) < 1e-4
        assert relative_error(found, ours("a hat", **call)) > 1e-3


def test_several_results_get_the_same_or_one_each(ours) -> None:
    both = ours(["a", "a hat"], **ONE | {"seed": [1, 2]}, cfg_scale=1, kv_cache=drawn_cache(batch=2))
    for index, text in enumerate(("a", "a hat")):
        part = {name: tuple(x[index : index + 1] for x in each) for name, each in drawn_cache(batch=2).items()}
        alone = ours(text, **ONE | {"seed": index + 1}, cfg_scale=1, kv_cache=part)
        assert relative_error(both[index : index + 1], alone) < TOLERANCE
    same = ours(["a", "a hat"], **ONE | {"seed": [1, 2]}, cfg_scale=1, kv_cache=drawn_cache())
    alone = ours("a", **ONE | {"seed": 1}, cfg_scale=1, kv_cache=drawn_cache())
    assert relative_error(same[:1], alone) < TOLERANCE


def test_what_does_not_fit_is_refused_before_anything_runs(ours) -> None:
    with pytest.raises(ValueError, match="kv_cache has 'block_2', and this network has block_0 to block_1; did you"):
        ours.check(prompt="a", kv_cache={"block_2": ()})
    reasons = ours.arguments_without_effect(prompt="a", cfg_scale=1, negative_kv_cache=drawn_cache())
    assert reasons == {"negative_kv_cache": "guidance is off (cfg_scale=1)"}
