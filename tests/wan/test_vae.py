"""Wan22Autoencoder equals diffusers' residual AutoencoderKLWan, loaded from the key names of its `vae/`."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderKLWan

import parity
import wan_vae_oracle
from diffsynth import _discovery
from diffsynth.core.loader import component, convert, files, header, recognize
from diffsynth.core.loader.checkpoint import read_files
from diffsynth.core.loader.config import ModelConfig
from diffsynth_wan.config import Wan22AutoencoderConfig, infer_wan22_autoencoder_config
from diffsynth_wan.vae import Wan22Autoencoder

CONFIG = Wan22AutoencoderConfig(dim=8, decoder_dim=12, dim_mult=(1, 2, 2), temporal_downsample=(False, True))
"""Config with every kind of layer and one level less than the published one: a test runs the oracle per parameter."""
FULL = Wan22AutoencoderConfig(dim=8, decoder_dim=8)
"""Config with the published number of levels, two of which also downsample time."""
WIDE = Wan22AutoencoderConfig(dim=96, decoder_dim=96, dim_mult=(1, 1), num_res_blocks=1, temporal_downsample=(True,))
LAYOUT = Path(__file__).parents[1] / "data" / "layouts" / "Wan2.2-TI2V-5B--wan_video_vae.json.gz"


def build_pair(config: Wan22AutoencoderConfig = CONFIG) -> tuple[Wan22Autoencoder, AutoencoderKLWan]:
    oracle = AutoencoderKLWan(
        base_dim=config.dim,
        decoder_base_dim=config.decoder_dim,
        z_dim=config.latent_channels,
        dim_mult=list(config.dim_mult),
        num_res_blocks=config.num_res_blocks,
        temperal_downsample=list(config.temporal_downsample),
        latents_mean=list(config.latents_mean),
        latents_std=list(config.latents_std),
        is_residual=True,
        in_channels=12,
        out_channels=12,
        patch_size=2,
    ).eval()
    weights = wan_vae_oracle.draw_weights(parity.shapes_of(oracle))
    oracle.load_state_dict(weights)
    return wan_vae_oracle.loaded(weights, "wan22_autoencoder", config), oracle


def draw_latents(frames: int, height: int = 3, width: int = 2, batch: int = 1) -> torch.Tensor:
    return torch.randn(batch, 48, frames, height, width, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize(("config", "frames"), [(CONFIG, 1), (CONFIG, 9), (FULL, 9)])
@torch.no_grad()
def test_encode_equals_diffusers(config: Wan22AutoencoderConfig, frames: int) -> None:
    ours, oracle = build_pair(config)
    video = wan_vae_oracle.draw_video(frames, 3 * config.factor, 2 * config.factor, batch=2)
    truth = wan_vae_oracle.latents_of(oracle, video)
    assert truth.shape[2:] == ((frames - 1) // config.time_factor + 1, 3, 2)
    assert parity.relative_error(ours.encode(video), truth) <= parity.TOLERANCE


@pytest.mark.parametrize(("config", "frames"), [(CONFIG, 1), (CONFIG, 3), (FULL, 3)])
@torch.no_grad()
def test_decode_equals_diffusers(config: Wan22AutoencoderConfig, frames: int) -> None:
    ours, oracle = build_pair(config)
    latents = draw_latents(frames, batch=2)
    truth = wan_vae_oracle.video_of(oracle, latents)
    assert float(truth.abs().max()) < 1  # otherwise diffusers clamps, which could hide a difference
    assert parity.relative_error(ours.decode(latents), truth) <= parity.TOLERANCE


def test_every_parameter_matters() -> None:
    _, oracle = build_pair()
    video, latents = wan_vae_oracle.draw_video(5, 8, 8), draw_latents(2, 1, 1)
    for part in (oracle.encoder, oracle.quant_conv):
        assert parity.neutral_parameters(part, lambda: wan_vae_oracle.latents_of(oracle, video)) == []
    for part in (oracle.decoder, oracle.post_quant_conv):
        assert parity.neutral_parameters(part, lambda: wan_vae_oracle.video_of(oracle, latents)) == []


@torch.no_grad()
def test_bf16_is_as_good_as_the_oracles() -> None:
    ours, oracle = build_pair()
    video, latents = wan_vae_oracle.draw_video(5, 16, 16), draw_latents(2, 2, 2)
    encoded, decoded = wan_vae_oracle.latents_of(oracle, video), wan_vae_oracle.video_of(oracle, latents)
    ours, oracle = ours.bfloat16(), oracle.bfloat16()
    theirs = parity.relative_error(wan_vae_oracle.latents_of(oracle, video.bfloat16()), encoded)
    assert parity.relative_error(ours.encode(video.bfloat16()), encoded) <= 1.5 * theirs
    theirs = parity.relative_error(wan_vae_oracle.video_of(oracle, latents.bfloat16()), decoded)
    assert parity.relative_error(ours.decode(latents.bfloat16()), decoded) <= 1.5 * theirs


@pytest.mark.parametrize("per_piece", [1, 2])
@torch.no_grad()
def test_pieces_equal_the_whole_at_a_real_width(per_piece: int) -> None:
    ours = Wan22Autoencoder(WIDE).eval()
    ours.load_state_dict(wan_vae_oracle.draw_weights(parity.shapes_of(ours)), assign=True)
    video, latents = wan_vae_oracle.draw_video(7, 12, 8), draw_latents(4)
    whole = ours.encode(video, latents_per_piece=4)
    assert parity.relative_error(ours.encode(video, latents_per_piece=per_piece), whole) <= 1e-5
    whole = ours.decode(latents, latents_per_piece=4)
    assert parity.relative_error(ours.decode(latents, latents_per_piece=per_piece), whole) <= 1e-5


@torch.no_grad()
def test_tiles_cover_every_pixel() -> None:
    ours, _ = build_pair()
    tiles = {"tiled": True, "tile_size": (3, 4), "tile_stride": (2, 2)}
    decoded = ours.decode(draw_latents(2, 5, 7), **tiles)
    assert decoded.shape == (1, 3, 3, 40, 56)
    assert bool(decoded.isfinite().all())
    encoded = ours.encode(wan_vae_oracle.draw_video(1, 40, 56), **tiles)
    assert encoded.shape == (1, 48, 1, 5, 7)
    assert bool(encoded.isfinite().all())


@pytest.mark.parametrize("tier", ["signature", "structure"])
def test_the_published_layout_loads_strictly(tier: str) -> None:
    facts = json.loads(gzip.decompress(LAYOUT.read_bytes()))["tensors"]
    tensors = header.Header({key: header.TensorInfo("F32", tuple(shape)) for key, shape in facts.items()})
    (found,) = recognize.recognize(tensors, *_discovery.catalog().layouts(), tiers=(tier,))
    assert (found.architecture.name, found.config) == ("wan22_autoencoder", Wan22AutoencoderConfig())
    plan = convert.plan(found.rules, tensors.shapes)
    assert convert.check(plan, parity.shapes_of(component.build(found.architecture, found.config)), where="") == []


def test_a_pickle_loads_as_its_tensors_do(tmp_path: Path) -> None:
    """`Wan2.2_VAE.pth` as published."""
    ours, _ = build_pair()
    torch.save(ours.state_dict(), tmp_path / "Wan2.2_VAE.pth")
    tensors = read_files(files.find(ModelConfig(path=tmp_path / "Wan2.2_VAE.pth")))
    (found,) = recognize.recognize(tensors, *_discovery.catalog().layouts())
    again = component.load_component(found, tensors, device="cpu", dtype=torch.float32)
    assert all(torch.equal(weight, ours.state_dict()[name]) for name, weight in again.state_dict().items())


def test_other_autoencoders_are_refused() -> None:
    with pytest.raises(ValueError, match="it has 16 latent channels"):
        infer_wan22_autoencoder_config({"conv2.weight": (16, 16, 1, 1, 1)})
    with pytest.raises(ValueError, match="its encoder takes 3 channels; expected a multiple of 4"):
        infer_wan22_autoencoder_config({"conv2.weight": (48, 48, 1, 1, 1), "encoder.conv1.weight": (160, 3, 3, 3, 3)})
