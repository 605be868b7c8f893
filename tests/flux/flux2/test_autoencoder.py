"""Flux2Autoencoder equals diffusers' AutoencoderKLFlux2 (0.42), which has the same key names."""

from __future__ import annotations

import pytest
import torch
from diffusers import AutoencoderKLFlux2

import parity
from diffsynth_flux.flux2.autoencoder import Flux2Autoencoder
from flux2_oracles import AUTOENCODER, draw_autoencoder, oracle_autoencoder, packed


@pytest.fixture(scope="module")
def pair() -> tuple[Flux2Autoencoder, AutoencoderKLFlux2]:
    oracle, ours = oracle_autoencoder(AUTOENCODER), Flux2Autoencoder(AUTOENCODER).eval()
    weights = draw_autoencoder(oracle)
    oracle.load_state_dict(weights)
    ours.load_state_dict(weights, assign=True)
    return ours, oracle


def oracle_latents(oracle: AutoencoderKLFlux2, image: torch.Tensor) -> torch.Tensor:
    return packed(oracle.encode(image).latent_dist.mode(), oracle)


def oracle_image(oracle: AutoencoderKLFlux2, latents: torch.Tensor) -> torch.Tensor:
    """Return the images of packed latents, by the formula of diffusers' pipeline."""
    mean, std = oracle.bn.running_mean, (oracle.bn.running_var + oracle.config.batch_norm_eps).sqrt()
    batch, channels, height, width = latents.shape
    patches = (latents * std[:, None, None] + mean[:, None, None]).view(batch, channels // 4, 2, 2, height, width)
    return oracle.decode(patches.permute(0, 1, 4, 2, 5, 3).reshape(batch, -1, 2 * height, 2 * width)).sample


def draw_image() -> torch.Tensor:
    return torch.rand(2, 3, 112, 80, generator=torch.Generator().manual_seed(1)) * 2 - 1


def draw_latents() -> torch.Tensor:
    return torch.randn(2, AUTOENCODER.packed_channels, 7, 5, generator=torch.Generator().manual_seed(1))


@torch.no_grad()
def test_encode_and_decode_equal_diffusers(pair) -> None:
    ours, oracle = pair
    truth = oracle_latents(oracle, draw_image())
    assert parity.relative_error(ours.encode(draw_image()), truth) <= parity.TOLERANCE
    assert parity.relative_error(ours.decode(draw_latents()), oracle_image(oracle, draw_latents())) <= parity.TOLERANCE


@torch.no_grad()
def test_moments_equal_diffusers(pair) -> None:
    ours, oracle = pair
    posterior = oracle.encode(draw_image()).latent_dist
    mean, logvar = ours.encode_moments(draw_image())
    assert parity.relative_error(mean, posterior.mean) <= parity.TOLERANCE
    assert parity.relative_error(logvar, posterior.logvar) <= parity.TOLERANCE


def test_every_parameter_matters(pair) -> None:
    """Every parameter changes the output except the bias of `to_k`, to which softmax is invariant."""
    _, oracle = pair
    image, latents = draw_image()[:1, :, :16, :32], draw_latents()[:1, :, :1, :1]

    def run() -> torch.Tensor:
        return torch.cat((oracle_latents(oracle, image).flatten(), oracle_image(oracle, latents).flatten()))

    assert parity.neutral_parameters(oracle, run) == [
        "encoder.mid_block.attentions.0.to_k.bias",
        "decoder.mid_block.attentions.0.to_k.bias",
    ]
    with torch.no_grad():
        before = run()
        for statistics in (oracle.bn.running_mean, oracle.bn.running_var):
            original = statistics.clone()
            statistics.mul_(1.5)
            assert parity.relative_error(run(), before) > 1e-3
            statistics.copy_(original)


@torch.no_grad()
def test_bf16_is_as_good_as_the_oracles(pair) -> None:
    ours, oracle = (type(each)(AUTOENCODER) if each is pair[0] else oracle_autoencoder(AUTOENCODER) for each in pair)
    for each in (ours, oracle):
        each.eval().load_state_dict(pair[0].state_dict())
        each.bfloat16()
    image, latents = draw_image(), draw_latents()
    encoded, decoded = oracle_latents(pair[1], image), oracle_image(pair[1], latents)
    theirs = parity.relative_error(oracle_latents(oracle, image.bfloat16()), encoded)
    assert parity.relative_error(ours.encode(image.bfloat16()), encoded) <= 1.5 * theirs
    theirs = parity.relative_error(oracle_image(oracle, latents.bfloat16()), decoded)
    assert parity.relative_error(ours.decode(latents.bfloat16()), decoded) <= 1.5 * theirs


@torch.no_grad()
def test_a_generator_draws_from_the_posterior(pair) -> None:
    ours, _ = pair
    image = draw_image()[:1]
    drawn = ours.encode(image, generator=torch.Generator().manual_seed(3))
    assert torch.equal(drawn, ours.encode(image, generator=torch.Generator().manual_seed(3)))
    assert 0.1 < float((drawn - ours.encode(image)).abs().mean()) < 10


@torch.no_grad()
def test_a_tile_that_holds_everything_is_the_whole_to_the_bit(pair) -> None:
    ours, _ = pair
    for tiling in ({"tiled": True}, {"tiled": True, "tile_size": (14, 10), "tile_stride": (1, 10)}):
        assert torch.equal(ours.decode(draw_latents(), **tiling), ours.decode(draw_latents()))
        assert torch.equal(ours.encode(draw_image(), **tiling), ours.encode(draw_image()))


@torch.no_grad()
def test_tiles_are_near_the_whole_and_finite(pair) -> None:
    """Tiles of an odd number of latent pixels are packed after they are joined."""
    ours, _ = pair
    tiling = {"tiled": True, "tile_size": (9, 7), "tile_stride": (5, 4)}
    for tiled, whole in (
        (ours.decode(draw_latents(), **tiling), ours.decode(draw_latents())),
        (ours.encode(draw_image(), **tiling), ours.encode(draw_image())),
    ):
        error = (tiled - whole).square().mean().sqrt() / whole.square().mean().sqrt()
        assert 0 < float(error) < 0.5


@torch.no_grad()
@pytest.mark.parametrize("size", [(1, 1), (1, 4), (5, 3)])
def test_tiles_leave_no_gap_at_any_size(pair, size) -> None:
    latents = torch.ones(1, AUTOENCODER.packed_channels, *size)
    image = pair[0].decode(latents, tiled=True, tile_size=(3, 3), tile_stride=(2, 2))
    assert image.shape == (1, 3, 16 * size[0], 16 * size[1])
    assert bool(image.isfinite().all())


def test_sizes_that_do_not_fit_are_refused(pair) -> None:
    with pytest.raises(ValueError, match="104x96; expected multiples of 16"):
        pair[0].encode(torch.zeros(1, 3, 104, 96))
