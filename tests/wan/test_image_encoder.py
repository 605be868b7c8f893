"""WanImageEncoder equals transformers' CLIP vision tower, loaded from both published layouts."""

from __future__ import annotations

import pytest
import torch
from transformers import CLIPVisionConfig, CLIPVisionModelWithProjection

import parity
from diffsynth_wan.image_encoder import MEAN, STD, WanImageEncoder, clip_pixels
from diffsynth_wan.tiny import TINY_IMAGE_ENCODER as CONFIG
from published_tensors import load_published

PUBLISHED_LAST = 31
"""Index in published files of the block that Wan skips; in tiny files it follows the other blocks."""


@pytest.fixture(scope="module")
def oracle() -> CLIPVisionModelWithProjection:
    model = CLIPVisionModelWithProjection(
        CLIPVisionConfig(
            hidden_size=CONFIG.dim,
            intermediate_size=CONFIG.dim_mlp,
            num_hidden_layers=CONFIG.num_layers + 1,
            num_attention_heads=CONFIG.num_heads,
            image_size=CONFIG.image_size,
            patch_size=CONFIG.patch_size,
            hidden_act="gelu",
            projection_dim=48,
            attn_implementation="eager",
        )
    ).eval()
    model.load_state_dict(parity.draw_weights(parity.shapes_of(model)))
    return model


def transformers_file(oracle: CLIPVisionModelWithProjection) -> dict[str, torch.Tensor]:
    last = f".layers.{CONFIG.num_layers}."
    return {key.replace(last, f".layers.{PUBLISHED_LAST}."): value for key, value in oracle.state_dict().items()}


def original_file(oracle: CLIPVisionModelWithProjection) -> dict[str, torch.Tensor]:
    """Return a file with open_clip's names, and a text tower that is dropped."""
    state = transformers_file(oracle)
    vision, embeddings = "vision_model.", "vision_model.embeddings."
    made = {
        "visual.cls_embedding": state[f"{embeddings}class_embedding"].view(1, 1, -1),
        "visual.pos_embedding": state[f"{embeddings}position_embedding.weight"][None],
        "visual.patch_embedding.weight": state[f"{embeddings}patch_embedding.weight"],
        "visual.head": state["visual_projection.weight"].T,
        "log_scale": torch.tensor(4.6),
        "textual.token_embedding.weight": torch.randn(7, 5),
        "textual.blocks.0.attn.q.weight": torch.randn(5, 5),
    }
    names = {"self_attn.out_proj": "attn.proj", "layer_norm1": "norm1", "layer_norm2": "norm2"}
    names |= {"mlp.fc1": "mlp.0", "mlp.fc2": "mlp.2"}
    for kind in ("weight", "bias"):
        made[f"visual.pre_norm.{kind}"] = state[f"{vision}pre_layrnorm.{kind}"]
        made[f"visual.post_norm.{kind}"] = state[f"{vision}post_layernorm.{kind}"]
        for index in (*range(CONFIG.num_layers), PUBLISHED_LAST):
            layer, block = f"{vision}encoder.layers.{index}", f"visual.transformer.{index}"
            parts = [state[f"{layer}.self_attn.{part}_proj.{kind}"] for part in "qkv"]
            made[f"{block}.attn.to_qkv.{kind}"] = torch.cat(parts)
            made |= {f"{block}.{new}.{kind}": state[f"{layer}.{old}.{kind}"] for old, new in names.items()}
    return made


@pytest.fixture(scope="module")
def ours(oracle: CLIPVisionModelWithProjection) -> WanImageEncoder:
    return load_published(original_file(oracle), expect="wan_image_encoder")


def draw_pixels() -> torch.Tensor:
    """An image of the network's size, which is not resized."""
    size = (2, 3, CONFIG.image_size, CONFIG.image_size)
    return torch.rand(size, generator=torch.Generator().manual_seed(1)) * 2 - 1


def run_oracle(oracle: CLIPVisionModelWithProjection, image: torch.Tensor) -> torch.Tensor:
    return oracle(clip_pixels(image, CONFIG.image_size), output_hidden_states=True).hidden_states[-2]


@torch.no_grad()
def test_equals_the_penultimate_states_of_transformers(ours, oracle):
    image = draw_pixels()
    assert parity.relative_error(ours(image), run_oracle(oracle, image)) <= parity.TOLERANCE


def test_every_parameter_matters(oracle):
    unread = [name for name, _ in oracle.named_parameters() if f".layers.{CONFIG.num_layers}." in name]
    unread += ["vision_model.post_layernorm.weight", "vision_model.post_layernorm.bias", "visual_projection.weight"]
    # Softmax is invariant to a constant that is added to all scores of a query.
    unread += [f"vision_model.encoder.layers.{n}.self_attn.k_proj.bias" for n in range(CONFIG.num_layers)]
    image = draw_pixels()
    assert parity.neutral_parameters(oracle, lambda: run_oracle(oracle, image), skip=unread) == []


def test_both_layouts_give_the_same_network(ours, oracle):
    again = load_published(transformers_file(oracle), expect="wan_image_encoder/transformers")
    theirs = again.state_dict()
    assert all(torch.equal(value, theirs[key]) for key, value in ours.state_dict().items())


def test_our_own_names(ours):
    again = load_published(
        {f"visual.{key}": value for key, value in ours.state_dict().items()}, expect="wan_image_encoder"
    )
    assert torch.equal(again(draw_pixels()), ours(draw_pixels()))


@torch.no_grad()
def test_bf16_is_as_good_as_the_oracles(ours, oracle):
    image = draw_pixels()
    truth = run_oracle(oracle, image)
    low = CLIPVisionModelWithProjection(oracle.config).eval()
    low.load_state_dict(oracle.state_dict())
    theirs = parity.relative_error(run_oracle(low.bfloat16(), image.bfloat16()), truth)
    mine = WanImageEncoder(CONFIG)
    mine.load_state_dict(ours.state_dict())
    assert parity.relative_error(mine.bfloat16()(image.bfloat16()), truth) <= 1.5 * theirs


def test_images_of_any_size_are_squeezed_to_a_square():
    grey = torch.zeros(1, 3, 40, 72)
    pixels = clip_pixels(grey, 56)
    assert pixels.shape == (1, 3, 56, 56)
    expected = (0.5 - torch.tensor(MEAN)) / torch.tensor(STD)
    assert torch.allclose(pixels, expected[None, :, None, None].expand_as(pixels))
