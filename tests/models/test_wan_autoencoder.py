"""WanAutoencoder equals diffusers' AutoencoderKLWan, and pieces of any length give the same result."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderKLQwenImage, AutoencoderKLWan

import parity
import wan_vae_oracle
from diffsynth import _discovery
from diffsynth.core.loader import component, convert, header, recognize
from diffsynth.core.progress import reporting, task
from diffsynth.models.config import WanAutoencoderConfig, infer_wan_autoencoder_config
from diffsynth.models.wan_autoencoder import WanAutoencoder

CONFIG = WanAutoencoderConfig(dim=8, dim_mult=(1, 2, 4), temporal_downsample=(False, True))
"""Config with every kind of layer and one level less than the published one: a test runs the oracle per parameter."""
FULL = WanAutoencoderConfig(dim=8)
"""Config with the published number of levels, two of which also downsample time."""

WIDE = WanAutoencoderConfig(dim=96, dim_mult=(1, 1), num_res_blocks=1, temporal_downsample=(True,))
LAYOUTS = Path(__file__).parents[1] / "data" / "layouts"
TILES = {"tiled": True, "tile_size": (4, 5), "tile_stride": (2, 3)}


def build_pair(config: WanAutoencoderConfig = CONFIG) -> tuple[WanAutoencoder, AutoencoderKLWan]:
    oracle = AutoencoderKLWan(
        base_dim=config.dim,
        z_dim=config.latent_channels,
        dim_mult=list(config.dim_mult),
        num_res_blocks=config.num_res_blocks,
        temperal_downsample=list(config.temporal_downsample),
    ).eval()
    weights = wan_vae_oracle.draw_weights(parity.shapes_of(oracle))
    oracle.load_state_dict(weights)
    return wan_vae_oracle.loaded(weights, "wan_autoencoder", config), oracle


def build(config: WanAutoencoderConfig) -> WanAutoencoder:
    ours = WanAutoencoder(config).eval()
    ours.load_state_dict(wan_vae_oracle.draw_weights(parity.shapes_of(ours)), assign=True)
    return ours


def draw_video(frames: int, height: int = 40, width: int = 24, batch: int = 1) -> torch.Tensor:
    return wan_vae_oracle.draw_video(frames, height, width, batch)


def draw_latents(frames: int, height: int = 5, width: int = 3, batch: int = 1) -> torch.Tensor:
    return torch.randn(batch, 16, frames, height, width, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize(("config", "frames"), [(CONFIG, 1), (CONFIG, 9), (FULL, 9)])
@torch.no_grad()
def test_encode_equals_diffusers(config: WanAutoencoderConfig, frames: int) -> None:
    ours, oracle = build_pair(config)
    video = draw_video(frames, batch=2)
    truth = wan_vae_oracle.latents_of(oracle, video)
    assert truth.shape[2] == (frames - 1) // config.time_factor + 1
    assert parity.relative_error(ours.encode(video), truth) <= parity.TOLERANCE


@pytest.mark.parametrize(("config", "frames"), [(CONFIG, 1), (CONFIG, 3), (FULL, 3)])
@torch.no_grad()
def test_decode_equals_diffusers(config: WanAutoencoderConfig, frames: int) -> None:
    ours, oracle = build_pair(config)
    latents = draw_latents(frames, batch=2)
    truth = wan_vae_oracle.video_of(oracle, latents)
    assert float(truth.abs().max()) < 1  # otherwise diffusers clamps, which could hide a difference
    assert parity.relative_error(ours.decode(latents), truth) <= parity.TOLERANCE


@torch.no_grad()
def test_moments_equal_diffusers() -> None:
    ours, oracle = build_pair()
    posterior = oracle.encode(draw_video(5)).latent_dist
    mean, logvar = ours.encode_moments(draw_video(5))
    assert parity.relative_error(mean, posterior.mean) <= parity.TOLERANCE
    assert parity.relative_error(logvar, posterior.logvar) <= parity.TOLERANCE


def test_every_parameter_matters() -> None:
    _, oracle = build_pair()
    video, latents = draw_video(5, 4, 4), draw_latents(2, 1, 1)
    assert parity.neutral_parameters(oracle.encoder, lambda: wan_vae_oracle.latents_of(oracle, video)) == []
    assert parity.neutral_parameters(oracle.decoder, lambda: wan_vae_oracle.video_of(oracle, latents)) == []
    assert parity.neutral_parameters(oracle.quant_conv, lambda: wan_vae_oracle.latents_of(oracle, video)) == []
    assert parity.neutral_parameters(oracle.post_quant_conv, lambda: wan_vae_oracle.video_of(oracle, latents)) == []


@torch.no_grad()
def test_bf16_is_as_good_as_the_oracles() -> None:
    ours, oracle = build_pair()
    video, latents = draw_video(5, 16, 16), draw_latents(2, 2, 2)
    encoded, decoded = wan_vae_oracle.latents_of(oracle, video), wan_vae_oracle.video_of(oracle, latents)
    ours, oracle = ours.bfloat16(), oracle.bfloat16()
    theirs = parity.relative_error(wan_vae_oracle.latents_of(oracle, video.bfloat16()), encoded)
    assert parity.relative_error(ours.encode(video.bfloat16()), encoded) <= 1.5 * theirs
    theirs = parity.relative_error(wan_vae_oracle.video_of(oracle, latents.bfloat16()), decoded)
    assert parity.relative_error(ours.decode(latents.bfloat16()), decoded) <= 1.5 * theirs


@pytest.mark.parametrize("per_piece", [1, 2])
@torch.no_grad()
def test_pieces_equal_the_whole_at_a_real_width(per_piece: int) -> None:
    ours = build(WIDE)
    video, latents = draw_video(7, 6, 4), draw_latents(4, 3, 2)
    whole = ours.encode(video, latents_per_piece=4)
    assert parity.relative_error(ours.encode(video, latents_per_piece=per_piece), whole) <= 1e-5
    whole = ours.decode(latents, latents_per_piece=4)
    assert parity.relative_error(ours.decode(latents, latents_per_piece=per_piece), whole) <= 1e-5


@torch.no_grad()
def test_equal_pieces_give_equal_bits() -> None:
    ours = build(CONFIG)
    latents, video = draw_latents(3), draw_video(5)
    streamed = list(ours.decode_pieces(latents.split(2, dim=2)))
    assert [piece.shape[2] for piece in streamed] == [3, 2]
    assert torch.equal(torch.cat(streamed, dim=2), ours.decode(latents, latents_per_piece=2))
    streamed = list(ours.encode_pieces(video.split([1, 2, 2], dim=2)))
    assert torch.equal(torch.cat(streamed, dim=2), ours.encode(video))


@torch.no_grad()
def test_pieces_come_before_the_last_is_asked_for() -> None:
    """A consumer that stops early does not compute the remaining pieces."""
    ours = build(CONFIG)
    asked = []

    def latents():
        for index in range(100):
            asked.append(index)
            yield draw_latents(1, 1, 1)

    frames = ours.decode_pieces(latents())
    assert next(frames).shape == (1, 3, 1, 4, 4)
    assert next(frames).shape == (1, 3, 2, 4, 4)
    assert len(asked) == 3


@torch.no_grad()
def test_no_frame_sees_a_later_one() -> None:
    ours = build(CONFIG)
    video, latents = draw_video(5), draw_latents(3)
    assert torch.allclose(ours.encode(video)[:, :, :2], ours.encode(video[:, :, :3]), atol=1e-5)
    assert torch.allclose(ours.decode(latents)[:, :, :3], ours.decode(latents[:, :, :2]), atol=1e-5)


@pytest.mark.parametrize("tiling", [TILES, TILES | {"tile_stride": (4, 5)}, TILES | {"tile_stride": (3, 2)}])
@torch.no_grad()
def test_tiles_cover_every_pixel(tiling: dict) -> None:
    ours = build(CONFIG)
    latents, video = draw_latents(1, 7, 9), draw_video(1, 28, 36)
    assert bool(ours.decode(latents, **tiling).isfinite().all())
    assert bool(ours.encode(video, **tiling).isfinite().all())


@pytest.mark.parametrize("channels", [3, 4])
@torch.no_grad()
def test_images_equal_diffusers(channels: int) -> None:
    """An image is a video of one frame, for Qwen-Image with transparency, too."""
    config = WanAutoencoderConfig(dim=8, in_channels=channels)
    oracle = AutoencoderKLQwenImage(base_dim=8, input_channels=channels).eval()
    weights = wan_vae_oracle.draw_weights(parity.shapes_of(oracle))
    oracle.load_state_dict(weights)
    ours = wan_vae_oracle.loaded(weights, "wan_autoencoder", config)
    generator = torch.Generator().manual_seed(1)
    image, latents = (
        torch.rand(2, size[0], *size[1:], generator=generator) for size in ((channels, 40, 24), (16, 5, 3))
    )
    truth = wan_vae_oracle.latents_of(oracle, image[:, :, None])[:, :, 0]
    assert parity.relative_error(ours.encode(image), truth) <= parity.TOLERANCE
    truth = wan_vae_oracle.video_of(oracle, latents[:, :, None])[:, :, 0]
    assert float(truth.abs().max()) < 1
    assert parity.relative_error(ours.decode(latents), truth) <= parity.TOLERANCE
    tiles = {"tiled": True, "tile_size": (3, 3), "tile_stride": (3, 3)}
    blocks = [wan_vae_oracle.video_of(oracle, part[:, :, None])[:, :, 0] for part in latents.split((3, 2), dim=2)]
    assert parity.relative_error(ours.decode(latents[:, :, 2:], **tiles), ours.decode(latents[:, :, 2:])) <= 1e-6
    assert parity.relative_error(ours.decode(latents, **tiles)[:, :, :16], blocks[0][:, :, :16]) <= parity.TOLERANCE


@torch.no_grad()
def test_a_tile_that_holds_everything_is_the_whole_to_the_bit() -> None:
    ours = build(CONFIG)
    assert torch.equal(ours.decode(draw_latents(2), tiled=True), ours.decode(draw_latents(2)))
    assert torch.equal(ours.encode(draw_video(5), tiled=True), ours.encode(draw_video(5)))


@torch.no_grad()
def test_tiles_equal_the_same_tiles_by_hand() -> None:
    """Tiles equal a blend that is written out here: each tile decoded alone and weighted by a pyramid."""
    ours = build(CONFIG)
    latents = draw_latents(2, 4, 6)
    got = ours.decode(latents, tiled=True, tile_size=(4, 4), tile_stride=(4, 2))
    left, right = ours.decode(latents[..., :4]), ours.decode(latents[..., 2:])
    ramp = torch.arange(1, 9) / 8
    total = torch.zeros_like(got)
    total[..., :16] += left * torch.cat((torch.ones(8), ramp.flip(0)))
    total[..., 8:] += right * torch.cat((ramp, torch.ones(8)))
    weight = torch.cat((torch.ones(8), ramp + ramp.flip(0), torch.ones(8)))
    assert parity.relative_error(got, total / weight) <= 1e-6


@torch.no_grad()
def test_the_second_video_has_the_tiles_of_the_first() -> None:
    """Tile sizes once grew with every video that was encoded, so only the first of several was right."""
    ours = build(CONFIG)
    first = ours.encode(draw_video(1, 28, 36), **TILES)
    assert torch.equal(ours.encode(draw_video(1, 28, 36), **TILES), first)
    assert torch.allclose(ours.encode(draw_video(1, 28, 36).repeat(2, 1, 1, 1, 1), **TILES)[1:], first, atol=1e-5)


@torch.no_grad()
def test_caches_of_tiles_may_wait_on_the_host(monkeypatch: pytest.MonkeyPatch) -> None:
    from diffsynth.core import device
    from diffsynth.models.causal_video import FrameCache

    ours = build(CONFIG)
    expected = ours.decode(draw_latents(2, 4, 6), **TILES)
    moves = []
    move = FrameCache.to
    monkeypatch.setattr(FrameCache, "to", lambda self, place: (moves.append(str(place)), move(self, place)))
    monkeypatch.setattr(device, "available_memory", lambda _: 1)
    assert torch.equal(ours.decode(draw_latents(2, 4, 6), **TILES), expected)
    assert len(moves) > 4


def test_memory_of_a_stream_does_not_grow() -> None:
    """The cache between two pieces is as large after fifty pieces as after two."""
    from diffsynth.models.causal_video import FrameCache

    ours = build(CONFIG)
    cache, waiting = FrameCache(), []
    with torch.no_grad():
        for _ in range(6):
            ours._decode_piece(draw_latents(1, 2, 2), cache)
            cache.is_first = False
            waiting.append(cache.nbytes)
    assert waiting[2:] == [waiting[2]] * 4
    cache.is_last = True
    ours._decode_piece(draw_latents(1, 2, 2), cache)
    assert cache.nbytes == 0


@torch.no_grad()
def test_progress_counts_pieces() -> None:
    ours = build(CONFIG)
    seen = []
    with reporting(seen.append), task("decode", total=1, unit="units", description="a unit"):
        ours.decode(draw_latents(3, 1, 1))
        ours.encode(draw_video(7, 4, 4), latents_per_piece=2)
    pieces = [(each.done, each.total) for each in seen if each.unit == "pieces"]
    assert pieces == [(0, 3), (1, 3), (2, 3), (3, 3), (0, 2), (1, 2), (2, 2)]
    assert {each.description for each in seen} == {"a unit"}


class Wrapper(torch.nn.Module):
    def __init__(self, inner: torch.nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, *inputs):
        return self.inner(*inputs)


@torch.no_grad()
def test_layers_may_be_wrapped() -> None:
    """A wrapped layer still gets the cache, although the wrapper has another class."""
    ours = build(CONFIG)
    expected = ours.decode(draw_latents(2, 1, 1))
    for index, layer in enumerate(ours.decoder.upsamples):
        ours.decoder.upsamples[index] = Wrapper(layer)
    assert torch.equal(ours.decode(draw_latents(2, 1, 1)), expected)


def test_blocks_can_be_streamed() -> None:
    from diffsynth.core.vram.partition import partition
    from diffsynth.models.checkpoints import WAN_AUTOENCODER

    parts = partition(build(CONFIG), repeated=WAN_AUTOENCODER.repeated_blocks, smallest=0)
    assert {"encoder.downsamples.0", "decoder.upsamples.0"} <= {block.name for block in parts.blocks}


def test_gradients_pass_through_pieces() -> None:
    ours = build(CONFIG)
    latents = draw_latents(2, 1, 1).requires_grad_()
    ours.decode(latents).square().mean().backward()
    assert bool((latents.grad.abs().sum(dim=(0, 1, 3, 4)) > 0).all())


@pytest.mark.parametrize(
    ("video", "message"),
    [
        (draw_video(4), "video has 4 frames; expected one more than a multiple of 2"),
        (draw_video(5, 38, 24), "video is 38x24; expected multiples of 4"),
    ],
)
def test_videos_that_do_not_fit_are_refused(video: torch.Tensor, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build(CONFIG).encode(video)


@torch.no_grad()
def test_pieces_that_do_not_fit_are_refused() -> None:
    ours = build(CONFIG)
    with pytest.raises(ValueError, match="a piece has 4 frames; expected one more than a multiple of 2"):
        list(ours.encode_pieces([draw_video(4)]))
    with pytest.raises(ValueError, match="a piece has 3 frames; expected a multiple of 2$"):
        list(ours.encode_pieces([draw_video(1), draw_video(3)]))


@pytest.mark.parametrize(
    ("tiling", "message"),
    [
        ({"tile_size": (0, 5)}, r"tile_size=\(0, 5\): expected two positive integers"),
        ({"tile_stride": (2, 2.5)}, r"tile_stride=\(2, 2.5\): expected two positive integers"),
        ({"tile_size": (4, 4), "tile_stride": (5, 4)}, "larger than tile_size=.* would leave gaps"),
    ],
)
def test_tiles_that_do_not_fit_are_refused(tiling: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build(CONFIG).decode(draw_latents(1), tiled=True, **tiling)


@pytest.mark.parametrize("name", ["Wan2.1-T2V-14B--wan_video_vae", "Qwen-Image--qwen_image_vae"])
@pytest.mark.parametrize("tier", ["signature", "structure"])
def test_published_layouts_load_strictly(name: str, tier: str) -> None:
    facts = json.loads(gzip.decompress((LAYOUTS / f"{name}.json.gz").read_bytes()))["tensors"]
    tensors = header.Header({key: header.TensorInfo("F32", tuple(shape)) for key, shape in facts.items()})
    (found,) = recognize.recognize(tensors, *_discovery.catalog().layouts(), tiers=(tier,))
    assert (found.architecture.name, found.config) == ("wan_autoencoder", WanAutoencoderConfig())
    network = component.build(found.architecture, found.config)
    plan = convert.plan(found.rules, tensors.shapes)
    assert convert.check(plan, parity.shapes_of(network), where=name) == []


def test_transparency_and_width_are_told_by_shapes() -> None:
    config = WanAutoencoderConfig(
        in_channels=4, dim=4, dim_mult=(1, 3, 2), num_res_blocks=1, temporal_downsample=(True, False)
    )
    with torch.device("meta"):
        assert infer_wan_autoencoder_config(parity.shapes_of(WanAutoencoder(config))) == config


def test_other_autoencoders_are_refused() -> None:
    with pytest.raises(ValueError, match="it has 48 latent channels"):
        infer_wan_autoencoder_config({"conv2.weight": (48, 48, 1, 1, 1)})
    with pytest.raises(ValueError, match="expected one value for each step between the 4 resolutions"):
        WanAutoencoderConfig(temporal_downsample=(True,))
    with pytest.raises(ValueError, match="expected one for each of 20 latent channels"):
        WanAutoencoderConfig(latent_channels=20)
