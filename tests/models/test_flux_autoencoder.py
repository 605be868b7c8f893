"""FluxAutoencoder equals diffusers' AutoencoderKL, which has the same key names."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from diffusers import AutoencoderKL
from hypothesis import given, settings
from hypothesis import strategies as st

import parity
from diffsynth.models.config import FluxAutoencoderConfig
from diffsynth.models.flux_autoencoder import FluxAutoencoder
from diffsynth.models.tiles import cover

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
    """Every parameter changes the output except the bias of `to_k`, to which softmax is invariant."""
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


@torch.no_grad()
def test_a_tile_that_holds_everything_is_the_whole_to_the_bit() -> None:
    ours, _ = build_pair()
    for tiling in ({"tiled": True}, {"tiled": True, "tile_size": (13, 11), "tile_stride": (1, 11)}):
        assert torch.equal(ours.decode(draw_latents(), **tiling), ours.decode(draw_latents()))
        assert torch.equal(ours.encode(draw_image(), **tiling), ours.encode(draw_image()))


@torch.no_grad()
def test_tiles_equal_the_same_tiles_by_hand() -> None:
    """Two columns of one size, where the stride would leave a narrow one, equal a blend that is written out here."""
    ours, _ = build_pair()
    latents, image = draw_latents()[:, :, :8], draw_image()[:, :, :64]
    tiling = {"tiled": True, "tile_size": (8, 8), "tile_stride": (8, 6)}
    ramp = torch.arange(1, 41) / 40
    rising, falling = torch.cat((ramp, torch.ones(24))), torch.cat((torch.ones(24), ramp.flip(0)))
    left, right = (torch.nn.functional.pad(ours.decode(part), pad) for part, pad in (
        (latents[..., :8], (0, 24)), (latents[..., 3:], (24, 0))))  # fmt: skip
    falling, rising = torch.nn.functional.pad(falling, (0, 24)), torch.nn.functional.pad(rising, (24, 0))
    expected = (left * falling + right * rising) / (falling + rising)
    assert parity.relative_error(ours.decode(latents, **tiling), expected) <= 1e-6
    left, right = ours.encode(image[..., :64]), ours.encode(image[..., 24:])
    ramp = torch.arange(1, 6) / 5
    share = ramp / (ramp + ramp.flip(0))
    middle = left[..., 3:] * (1 - share) + right[..., :5] * share
    expected = torch.cat((left[..., :3], middle, right[..., 5:]), dim=-1)
    assert parity.relative_error(ours.encode(image, **tiling), expected) <= 1e-6


@torch.no_grad()
def test_tiles_are_near_the_whole_and_nearer_the_larger_they_are() -> None:
    """Tiled results differ, as norms and attention span one tile; relative errors (RMS) stay below these bounds."""
    ours, _ = build_pair()
    latents, image = draw_latents(), draw_image()
    whole, encoded = ours.decode(latents), ours.encode(image)
    for side, stride, at_most in ((8, 6, 0.2), (12, 9, 0.05)):
        tiling = {"tiled": True, "tile_size": (side, side), "tile_stride": (stride, stride)}
        assert 0 < rms(ours.decode(latents, **tiling), whole) <= at_most
        assert 0 < rms(ours.encode(image, **tiling), encoded) <= at_most


def rms(got: torch.Tensor, expected: torch.Tensor) -> float:
    return float((got - expected).square().mean().sqrt() / expected.square().mean().sqrt())


@settings(max_examples=50)
@given(st.integers(1, 70), st.integers(1, 20), st.integers(1, 20))
def test_even_tiles_have_one_size_and_leave_no_gap(extent: int, size: int, stride: int) -> None:
    """The reference's tiles left a rest uncovered (NaN), and failed where an image is smaller than a tile."""
    stride = min(size, stride)
    spans = [t.rows for t in cover(extent, 1, tiled=True, tile_size=(size, 1), tile_stride=(stride, 1), even=True)]
    assert {span.stop - span.start for span in spans} == {min(size, extent)}
    assert (spans[0].start, spans[-1].stop) == (0, extent)
    for before, after in pairwise(spans):
        assert 0 < after.start - before.start <= stride
        assert before.fade_out == after.fade_in == before.stop - after.start
    assert (spans[0].fade_in, spans[-1].fade_out) == (0, 0)


def test_tiles_that_do_not_fit_are_refused() -> None:
    ours, _ = build_pair()
    with pytest.raises(ValueError, match=r"tile_size=\(0, 8\): expected two positive integers"):
        ours.decode(draw_latents(), tiled=True, tile_size=(0, 8))
    with pytest.raises(ValueError, match="larger than tile_size=.* would leave gaps"):
        ours.encode(draw_image(), tiled=True, tile_size=(4, 4), tile_stride=(5, 4))
