"""SiglipImageEncoder equals transformers' SiglipVisionModel, loaded from the names of each published file."""

from __future__ import annotations

import dataclasses

import pytest
import torch

import parity
from diffsynth import _discovery
from diffsynth.core.loader import layouts
from diffsynth.core.loader.header import Header, TensorInfo
from diffsynth.core.loader.recognize import recognize
from diffsynth.models.image_config import TINY_SIGLIP, SiglipImageEncoderConfig, infer_siglip_config
from diffsynth.models.siglip import SiglipImageEncoder
from published_tensors import load_published
from siglip_oracles import siglip_oracle

GIANT = SiglipImageEncoderConfig(
    hidden_size=1536, head_dim=96, num_layers=40, intermediate_size=6144, patch_size=16, image_size=384
)
TINY_GIANT = dataclasses.replace(GIANT, hidden_size=192, num_layers=2, intermediate_size=80, image_size=64)
CONFIGS = {"siglip": TINY_SIGLIP, "siglip2": TINY_GIANT}


def images(config: SiglipImageEncoderConfig) -> torch.Tensor:
    size = (2, 3, config.image_size, config.image_size)
    return torch.rand(size, generator=torch.Generator().manual_seed(3)) * 2 - 1


@pytest.mark.parametrize("name", CONFIGS)
@torch.no_grad()
def test_equals_transformers(name):
    """SigLIP 2 is published without the prefix, and SigLIP as a whole model."""
    config = CONFIGS[name]
    truth, pixels = siglip_oracle(config), images(config)
    tensors = {key: tensor.detach() for key, tensor in truth.named_parameters()}
    whole = {f"vision_model.{key}": tensor for key, tensor in tensors.items()}
    whole |= {"text_model.head.bias": torch.ones(3), "logit_scale": torch.ones(1), "logit_bias": torch.ones(1)}
    alone = load_published(tensors, expect="siglip_image_encoder/vision_only")
    of_whole = load_published(whole, expect="siglip_image_encoder/with_text_encoder")
    for ours in (alone, of_whole):
        assert ours.config == config
        expected = truth(pixels)
        assert parity.relative_error(ours(pixels), expected.last_hidden_state) < parity.TOLERANCE
        assert parity.relative_error(ours(pixels, pooled=True), expected.pooler_output) < parity.TOLERANCE


def test_every_parameter_matters():
    """But for the keys' biases, which softmax removes; those of the head are a third of one parameter."""
    truth, pixels = siglip_oracle(TINY_GIANT), images(TINY_GIANT)
    keys = [name for name, _ in truth.named_parameters() if name.endswith("k_proj.bias")]
    assert parity.neutral_parameters(truth, lambda: truth(pixels).pooler_output, skip=keys) == []


@pytest.mark.parametrize(
    ("checkpoint", "config"),
    [
        ("siglip_image_encoder", SiglipImageEncoderConfig()),
        ("siglip_image_encoder/with_text_encoder", SiglipImageEncoderConfig()),
        ("siglip_image_encoder/vision_only", GIANT),
    ],
)
@pytest.mark.parametrize("tier", ["signature", "structure"])
def test_the_published_files(checkpoint, config, tier):
    architectures, checkpoints = _discovery.catalog().layouts()
    spec = next(each for each in checkpoints if each.name == checkpoint)
    shapes = layouts.layout_of(spec)
    file = Header({key: TensorInfo("BF16", shape) for key, shape in shapes.items()})
    (found,) = recognize(file, architectures, checkpoints, tiers=(tier,))
    assert (found.architecture.name, found.config) == ("siglip_image_encoder", config)
    with torch.device("meta"):
        names = parity.shapes_of(SiglipImageEncoder(config))
    assert infer_siglip_config(names) == config
    assert len(names) <= len(shapes)


def test_a_network_without_its_head():
    config = dataclasses.replace(TINY_SIGLIP, pooling_head=False)
    assert infer_siglip_config(parity.shapes_of(SiglipImageEncoder(config))) == config


def test_widths_of_other_heads_are_refused():
    with pytest.raises(ValueError, match="hidden_size=100: expected a multiple of the head dimension 72"):
        dataclasses.replace(TINY_SIGLIP, hidden_size=100)
