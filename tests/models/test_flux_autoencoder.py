"""FluxAutoencoder against diffusers' AutoencoderKL, through the published key names (the two share them)."""

from __future__ import annotations

import pytest
import torch
from diffusers import AutoencoderKL

import parity
from diffsynth.models.config import FluxAutoencoderConfig
from diffsynth.models.flux_autoencoder import FluxAutoencoder

CONFIG = FluxAutoencoderConfig(block_out_channels=(16, 32, 32, 64), layers_per_block=2, norm_groups=8)


def build_pair(config: FluxAutoencoderConfig = CONFIG) -> tuple[FluxAutoencoder, AutoencoderKL]:
    levels = len(config.block_out_channels)
    oracle = AutoencoderKL(
        in_channels=config.in_channels,
        out_channels=config.in_channels,
        down_block_types=("DownEncoderBlock2D",) * levels,
        up_block_types=("UpDecoderBlock2D",) * levels,
        block_out_channels=config.block_out_channels,
        layers_per_block=config.layers_per_block,
        latent_channels=config.latent_channels,
        norm_num_groups=config.norm_groups,
        use_quant_conv=False,
        use_post_quant_conv=False,
    ).eval()
    ours = FluxAutoencoder(config).eval()
    weights = parity.draw_weights(parity.shapes_of(oracle))
    oracle.load_state_dict(weights)
    ours.load_state_dict(weights, assign=True)
    return ours, oracle


def oracle_latents(oracle: AutoencoderKL, image: torch.Tensor) -> torch.Tensor:
    return (oracle.encode(image).latent_dist.mode() - CONFIG.shift_factor) * CONFIG.scaling_factor


def oracle_image(oracle: AutoencoderKL, latents: torch.Tensor) -> torch.Tensor:
    return oracle.decode(latents / CONFIG.scaling_factor + CONFIG.shift_factor).sample


def draw_image() -> torch.Tensor:
    return torch.rand(2, 3, 104, 88, generator=torch.Generator().manual_seed(1)) * 2 - 1


def draw_latents() -> torch.Tensor:
    return torch.randn(2, 16, 13, 11, generator=torch.Generator().manual_seed(1))


@torch.no_grad()
def test_encode_equals_diffusers() -> None:
    ours, oracle = build_pair()
    error = parity.relative_error(ours.encode(draw_image()), oracle_latents(oracle, draw_image()))
    assert error <= parity.TOLERANCE


@torch.no_grad()
def test_decode_equals_diffusers() -> None:
    ours, oracle = build_pair()
    error = parity.relative_error(ours.decode(draw_latents()), oracle_image(oracle, draw_latents()))
    assert error <= parity.TOLERANCE


@torch.no_grad()
def test_moments_equal_diffusers() -> None:
    ours, oracle = build_pair()
    posterior = oracle.encode(draw_image()).latent_dist
    mean, logvar = ours.encode_moments(draw_image())
    assert parity.relative_error(mean, posterior.mean) <= parity.TOLERANCE
    assert parity.relative_error(logvar, posterior.logvar) <= parity.TOLERANCE


def test_every_parameter_matters() -> None:
    """Softmax forgets what all keys share, so a bias of `to_k` is neutral by mathematics; nothing else may be."""
    _, oracle = build_pair()
    image, latents = draw_image()[:1, :, :32, :24], draw_latents()[:1, :, :4, :3]

    def run() -> torch.Tensor:
        return torch.cat((oracle_latents(oracle, image).flatten(), oracle_image(oracle, latents).flatten()))

    assert parity.neutral_parameters(oracle, run) == [
        "encoder.mid_block.attentions.0.to_k.bias",
        "decoder.mid_block.attentions.0.to_k.bias",
    ]


@torch.no_grad()
def test_bf16_is_as_good_as_the_oracles() -> None:
    ours, oracle = build_pair()
    image, latents = draw_image(), draw_latents()
    encoded, decoded = oracle_latents(oracle, image), oracle_image(oracle, latents)
    ours, oracle = ours.bfloat16(), oracle.bfloat16()
    theirs = parity.relative_error(oracle_latents(oracle, image.bfloat16()), encoded)
    assert parity.relative_error(ours.encode(image.bfloat16()), encoded) <= 1.5 * theirs
    theirs = parity.relative_error(oracle_image(oracle, latents.bfloat16()), decoded)
    assert parity.relative_error(ours.decode(latents.bfloat16()), decoded) <= 1.5 * theirs


@torch.no_grad()
def test_a_generator_draws_from_the_posterior() -> None:
    ours, _ = build_pair()
    image = draw_image()[:1]
    mean, logvar = ours.encode_moments(image)
    drawn = ours.encode(image, generator=torch.Generator().manual_seed(3))
    z = drawn / CONFIG.scaling_factor + CONFIG.shift_factor
    standard = (z - mean) / (0.5 * logvar).exp()
    assert abs(float(standard.mean())) < 0.1
    assert abs(float(standard.std()) - 1) < 0.1
    assert torch.equal(drawn, ours.encode(image, generator=torch.Generator().manual_seed(3)))


def test_sizes_that_do_not_fit_are_refused() -> None:
    ours, _ = build_pair()
    with pytest.raises(ValueError, match="100x96; expected multiples of 8"):
        ours.encode(torch.zeros(1, 3, 100, 96))
