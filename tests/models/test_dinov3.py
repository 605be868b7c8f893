"""Dinov3ImageEncoder equals transformers' DINOv3ViTModel, loaded from the published key names."""

from __future__ import annotations

import dataclasses
import hashlib

import pytest
import torch
from transformers import DINOv3ViTConfig, DINOv3ViTModel

import parity
from diffsynth import _discovery
from diffsynth.core.loader import layouts
from diffsynth.models.dinov3 import Dinov3ImageEncoder
from diffsynth.models.image_config import TINY_DINOV3 as CONFIG
from diffsynth.models.image_config import Dinov3ImageEncoderConfig, infer_dinov3_config
from published_tensors import load_published

IMAGES = torch.randn(2, 3, 32, 48, generator=torch.Generator().manual_seed(3))


@pytest.fixture(scope="module")
def oracle() -> DINOv3ViTModel:
    """transformers' network with random weights and its own attention."""
    network = DINOv3ViTModel(
        DINOv3ViTConfig(
            hidden_size=CONFIG.hidden_size,
            num_hidden_layers=CONFIG.num_layers,
            num_attention_heads=2,
            intermediate_size=CONFIG.intermediate_size,
            num_register_tokens=4,
            hidden_act="silu",
            use_gated_mlp=True,
            query_bias=False,
            key_bias=False,
            value_bias=False,
            pos_embed_rescale=2.0,
            attn_implementation="eager",
        )
    ).eval()
    shapes = {name: tuple(parameter.shape) for name, parameter in network.named_parameters()}
    with torch.no_grad():
        for name, weight in parity.draw_weights(shapes, seed=4).items():
            # Sharper attention, in which queries and keys have an effect.
            network.get_parameter(name).copy_(3 * weight if "q_proj" in name else weight)
    return network


def published(oracle: DINOv3ViTModel) -> dict[str, torch.Tensor]:
    """Return the weights under the names of the published file, which an earlier transformers wrote."""
    return {name.removeprefix("model."): tensor.detach() for name, tensor in oracle.named_parameters()}


@torch.no_grad()
def test_equals_transformers(oracle):
    ours = load_published(published(oracle), expect="dinov3_image_encoder")
    assert ours.config == CONFIG
    assert parity.relative_error(ours(IMAGES), oracle(IMAGES).pooler_output) < parity.TOLERANCE
    halves = [module(IMAGES.bfloat16()) for module in (ours.bfloat16(), oracle.bfloat16())]
    oracle.float()
    assert parity.relative_error(halves[0].float(), halves[1].pooler_output.float()) < 0.05


def test_every_parameter_matters(oracle):
    """But for the embedding of masked patches, which our network leaves out."""
    run = lambda: oracle(IMAGES).pooler_output  # noqa: E731
    assert parity.neutral_parameters(oracle, run) == ["embeddings.mask_token"]


def test_the_published_layout():
    checkpoint = next(each for each in _discovery.catalog().layouts()[1] if each.name == "dinov3_image_encoder")
    shapes = dict(layouts.layout_of(checkpoint))
    assert infer_dinov3_config(shapes) == Dinov3ImageEncoderConfig()
    with torch.device("meta"):
        names = parity.shapes_of(Dinov3ImageEncoder(Dinov3ImageEncoderConfig()))
    assert names | {"embeddings.mask_token": (1, 1, 4096)} == shapes
    facts = [fact for key, shape in shapes.items() for fact in (key, f"{key}:{'_'.join(map(str, shape))}")]
    assert hashlib.md5(",".join(sorted(facts)).encode()).hexdigest() == checkpoint.signature


def test_other_networks_are_refused():
    with pytest.raises(ValueError, match="its queries have a bias"):
        infer_dinov3_config({"layer.0.attention.q_proj.bias": (384,)})
    with pytest.raises(ValueError, match="hidden_size=384: expected a multiple of the head dimension 256"):
        dataclasses.replace(CONFIG, hidden_size=384, head_dim=256)
