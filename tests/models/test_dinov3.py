"""Dinov3ImageEncoder equals transformers' DINOv3ViTModel, loaded from the published key names."""

from __future__ import annotations

import dataclasses
import hashlib

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import DINOv3ViTConfig, DINOv3ViTModel

import parity
from diffsynth import _discovery
from diffsynth.core.loader import layouts
from diffsynth.models.dinov3 import Dinov3ImageEncoder, dinov3_pixels
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


def random_image(width: int, height: int, mode: str = "RGB") -> Image.Image:
    levels = np.random.default_rng(5).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(levels).convert(mode)


@pytest.mark.parametrize(("width", "height"), [(61, 37), (20, 24), (32, 32)])
def test_pixels(width, height):
    """Pillow scales single channels of unrounded levels with the same filter."""
    image = random_image(width, height)
    channels = [Image.fromarray(np.asarray(image, dtype=np.float32)[:, :, channel] / 255) for channel in range(3)]
    scaled = np.stack([np.asarray(each.resize((32, 32), Image.Resampling.BILINEAR)) for each in channels])
    expected = (scaled - np.array([[[0.485]], [[0.456]], [[0.406]]])) / np.array([[[0.229]], [[0.224]], [[0.225]]])
    got = dinov3_pixels(image, 32)
    assert got.shape == (1, 3, 32, 32)
    assert float((got[0].double() - torch.from_numpy(expected)).abs().max()) < 2e-5


def test_pixels_equal_those_of_transformers():
    pytest.importorskip("torchvision", reason="transformers' image processor of DINOv3 needs torchvision")
    from transformers import DINOv3ViTImageProcessor

    image = random_image(61, 37)
    expected = DINOv3ViTImageProcessor()(images=image, return_tensors="pt")["pixel_values"]
    assert float((dinov3_pixels(image, 224) - expected).abs().max()) < 2e-5


def test_pixels_of_other_modes():
    assert torch.equal(
        dinov3_pixels(random_image(20, 20, "L"), 16), dinov3_pixels(random_image(20, 20, "L").convert("RGB"), 16)
    )
