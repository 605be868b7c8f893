"""Configs of the shared networks are inferred from shapes."""

from __future__ import annotations

import gzip
import json
from importlib.resources import files

import pytest
import torch

import parity
from diffsynth.models.config import (
    TINY_FLUX_AUTOENCODER,
    TINY_QWEN3_TEXT_ENCODER,
    FluxAutoencoderConfig,
    Qwen3TextEncoderConfig,
    infer_flux_autoencoder_config,
    infer_qwen3_text_encoder_config,
)
from diffsynth.models.flux_autoencoder import FluxAutoencoder
from diffsynth.models.qwen3 import Qwen3TextEncoder

QWEN3_8B = Qwen3TextEncoderConfig(hidden_size=4096, intermediate_size=12288)


def published_shapes(name: str) -> dict[str, tuple[int, ...]]:
    packed = files("diffsynth.models").joinpath(f"layouts/{name}.json.gz").read_bytes()
    return {key: tuple(shape) for key, shape in json.loads(gzip.decompress(packed))["tensors"].items()}


@pytest.mark.parametrize("config", [FluxAutoencoderConfig(), TINY_FLUX_AUTOENCODER])
def test_autoencoder(config: FluxAutoencoderConfig) -> None:
    with torch.device("meta"):
        shapes = parity.shapes_of(FluxAutoencoder(config))
    assert infer_flux_autoencoder_config(shapes) == config
    if config == FluxAutoencoderConfig():
        assert shapes == published_shapes("z_image_turbo_autoencoder")


@pytest.mark.parametrize("config", [Qwen3TextEncoderConfig(), QWEN3_8B, TINY_QWEN3_TEXT_ENCODER])
def test_text_encoder(config: Qwen3TextEncoderConfig) -> None:
    with torch.device("meta"):
        encoder = Qwen3TextEncoder(config)
    shapes = parity.shapes_of(encoder)
    assert infer_qwen3_text_encoder_config(shapes) == config
    assert list(encoder.buffers()) == []
    if config == Qwen3TextEncoderConfig():
        assert shapes == published_shapes("qwen3_4b")
    if config == QWEN3_8B:
        assert shapes | {"lm_head.weight": (151936, 4096)} == published_shapes("qwen3_8b_with_head")


def test_other_autoencoders_are_refused() -> None:
    shapes = published_shapes("z_image_turbo_autoencoder")
    with pytest.raises(ValueError, match=r"it has quant_conv.weight"):
        infer_flux_autoencoder_config(shapes | {"quant_conv.weight": (32, 32, 1, 1)})
    with pytest.raises(ValueError, match="the encoder gives 48 channels"):
        infer_flux_autoencoder_config(shapes | {"encoder.conv_out.weight": (48, 512, 3, 3)})


def test_other_language_models_are_refused() -> None:
    shapes = {name: shape for name, shape in published_shapes("qwen3_4b").items() if "q_norm" not in name}
    with pytest.raises(ValueError, match="q_norm.weight is missing: not a Qwen3"):
        infer_qwen3_text_encoder_config(shapes)


def test_widths_that_do_not_split_into_groups_are_refused() -> None:
    with pytest.raises(ValueError, match="must be multiples of norm_groups=32"):
        FluxAutoencoderConfig(block_out_channels=(48, 64))


def test_configs_survive_json() -> None:
    config = FluxAutoencoderConfig()
    assert FluxAutoencoderConfig(**json.loads(json.dumps(vars(config)))) == config
