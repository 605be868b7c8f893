"""The causal video autoencoder of Wan 2.1 and Qwen-Image (Wan 2025, arXiv:2503.20314), and what Wan 2.2's shares."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import pairwise
from typing import Any, Unpack

import torch
from jaxtyping import Float
from torch import Tensor, nn

from diffsynth.core import device as devices
from diffsynth.core.repeats import repeated
from diffsynth.models.causal_video import Decoder, Downsample, Encoder, FrameCache, ResidualBlock, Upsample
from diffsynth.models.config import WanAutoencoderConfig
from diffsynth.models.tiles import Blend, Tile, Tiling, cover

Progress = Callable[[Sequence[Tensor]], Iterable[Tensor]]
"""Yields the pieces it is given while it shows how far it is, as `tqdm` does."""


class CausalAutoencoder(nn.Module):
    """Videos in [-1, 1] to scaled latents and back, piece by piece, so that memory does not grow with their length.

    The first frame becomes the first latent frame alone, `config.time_factor` frames each further one: a picture is a
    video of one frame. A subclass builds encoder and decoder for its config, which also says `factor`,
    `latent_channels`, `latents_mean` and `latents_std`.
    """

    def __init__(self, config: Any, encoder: nn.Module, decoder: nn.Module) -> None:
        super().__init__()
        self.config = config
        self.encoder = encoder
        self.conv1 = nn.Conv3d(2 * config.latent_channels, 2 * config.latent_channels, 1)
        self.conv2 = nn.Conv3d(config.latent_channels, config.latent_channels, 1)
        self.decoder = decoder

    def encode(
        self,
        video: Float[Tensor, "b c_in t4 h8 w8"],
        *,
        latents_per_piece: int = 1,
        progress: Progress | None = None,
        **tiling: Unpack[Tiling],
    ) -> Float[Tensor, "b c t h w"]:
        """Scaled latents, `(mean - latents_mean) / latents_std`, in the dtype of `video`.

        Args:
            video: in [-1, 1]; `config.time_factor * k + 1` frames, sides that are multiples of `config.factor`.
            latents_per_piece: latent frames at once. Memory grows with it; the last bits depend on it.
            progress: shows how far it is.
            tiling: see `Tiling`.

        Raises:
            ValueError: frames or sides that do not fit, or tiles that would leave gaps.
        """
        pieces = self.split_video(video, latents_per_piece)
        encoded = self.encode_pieces(pieces if progress is None else progress(pieces), **tiling)
        return torch.cat(list(encoded), dim=2)

    def decode(
        self,
        latents: Float[Tensor, "b c t h w"],
        *,
        latents_per_piece: int = 1,
        progress: Progress | None = None,
        **tiling: Unpack[Tiling],
    ) -> Float[Tensor, "b c_in t4 h8 w8"]:
        """The whole video of scaled latents, about [-1, 1], not clamped. Arguments and errors are those of `encode`."""
        pieces = latents.split(latents_per_piece, dim=2)
        decoded = self.decode_pieces(pieces if progress is None else progress(pieces), **tiling)
        first = next(decoded)
        frames = self.config.time_factor * (latents.shape[2] - 1) + 1
        # Filled as it comes: joining at the end would hold the video twice.
        video = first.new_empty((*first.shape[:2], frames, *first.shape[3:]))
        video[:, :, : first.shape[2]] = first
        at = first.shape[2]
        for piece in decoded:
            video[:, :, at : at + piece.shape[2]] = piece
            at += piece.shape[2]
        return video

    def encode_pieces(
        self, pieces: Iterable[Float[Tensor, "b c_in t4 h8 w8"]], **tiling: Unpack[Tiling]
    ) -> Iterator[Float[Tensor, "b c t h w"]]:
        """Scaled latents of a video that comes in pieces, piece by piece.

        Args:
            pieces: the first of `config.time_factor * k + 1` frames, the others of a multiple of `config.time_factor`.
            tiling: see `Tiling`.

        Raises:
            ValueError: frames or sides that do not fit, or tiles that would leave gaps.
        """
        for moments in self._streamed(self._encode_piece, pieces, self.config.factor, 1, tiling):
            mean, _ = moments.chunk(2, dim=1)
            shift, scale = self._latent_scales(mean)
            yield ((mean - shift) / scale).to(mean.dtype)

    def encode_moments(
        self, video: Float[Tensor, "b c_in t4 h8 w8"]
    ) -> tuple[Float[Tensor, "b c t h w"], Float[Tensor, "b c t h w"]]:
        """Mean and log-variance of the posterior of the *unscaled* latents; the latter clamped to [-30, 20].

        Raises:
            ValueError: frames or sides that do not fit.
        """
        encoded = self._streamed(self._encode_piece, self.split_video(video), self.config.factor, 1, {})
        mean, logvar = torch.cat(list(encoded), dim=2).chunk(2, dim=1)
        return mean, logvar.clamp(-30.0, 20.0)

    def decode_pieces(
        self, pieces: Iterable[Float[Tensor, "b c t h w"]], **tiling: Unpack[Tiling]
    ) -> Iterator[Float[Tensor, "b c_in t4 h8 w8"]]:
        """Frames of scaled latents, piece by piece, as a writer wants them; of a whole: `latents.split(1, dim=2)`.

        The very first latent frame gives one frame, every other `config.time_factor`.

        Raises:
            ValueError: tiles that would leave gaps.
        """
        return self._streamed(self._decode_piece, pieces, 1, self.config.factor, tiling)

    def split_video(
        self, video: Float[Tensor, "b c_in t4 h8 w8"], latents_per_piece: int = 1
    ) -> list[Float[Tensor, "b c_in t4_piece h8 w8"]]:
        """A video in pieces for `encode_pieces`; views.

        Raises:
            ValueError: frames or sides that do not fit.
        """
        factor, frames = self.config.time_factor, video.shape[2]
        if frames % factor != 1 % factor:
            raise ValueError(f"video has {frames} frames; expected a multiple of {factor} and one more")
        first = factor * (latents_per_piece - 1) + 1
        head, later = video[:, :, :first], video[:, :, first:]
        return [head, *(later.split(factor * latents_per_piece, dim=2) if later.shape[2] else ())]

    def forward(self, video: Float[Tensor, "b c_in t4 h8 w8"]) -> Float[Tensor, "b c_in t4 h8 w8"]:
        """The reconstruction from the posterior's mean."""
        return self.decode(self.encode(video))

    def patchify(self, video: Float[Tensor, "b c_in t h w"]) -> Float[Tensor, "b c2 t h2 w2"]:
        """What the encoder sees of frames."""
        return video

    def unpatchify(self, patches: Float[Tensor, "b c2 t h2 w2"]) -> Float[Tensor, "b c_in t h w"]:
        """Frames from what the decoder gives."""
        return patches

    def _streamed(
        self,
        run: Callable[[Tensor, FrameCache], Tensor],
        pieces: Iterable[Tensor],
        scale_in: int,
        scale_out: int,
        tiling: Tiling,
    ) -> Iterator[Tensor]:
        """Every piece through `run`. Each tile is a video of its own, with its own cache; all advance together."""
        tiles: list[Tile] = []
        caches: list[FrameCache] = []
        wait_on_host: bool | None = None
        for piece, is_last in _with_last(pieces):
            height, width = _latent_size(piece, scale_in)
            if not tiles:
                tiles = cover(height, width, **tiling)
                caches = [FrameCache() for _ in tiles]
            blend = None
            for tile, cache in zip(tiles, caches, strict=True):
                cache.is_last = is_last
                if wait_on_host:
                    cache.to(piece.device)
                part = repeated(run, tile.cut(piece, scale_in), cache)
                blend = blend or Blend(height, width, scale_out, like=part)
                blend.add(tile, part)
                cache.is_first = False
                if wait_on_host is None:
                    wait_on_host = _too_many(cache, len(tiles), piece.device)
                if wait_on_host:
                    cache.to("cpu")
            assert blend is not None
            yield blend.result()

    def _encode_piece(self, piece: Tensor, cache: FrameCache) -> Tensor:
        factor, frames = self.config.time_factor, piece.shape[2]
        if frames % factor != (1 % factor if cache.is_first else 0):
            rest = " and one more, the first" if cache.is_first else ""
            raise ValueError(f"a piece of {frames} frames; expected a multiple of {factor}{rest}")
        return self.conv1(self.encoder(self.patchify(piece), cache))

    def _decode_piece(self, piece: Tensor, cache: FrameCache) -> Tensor:
        shift, scale = self._latent_scales(piece)
        latents = (piece * scale + shift).to(piece.dtype)
        return self.unpatchify(self.decoder(self.conv2(latents), cache))

    def _latent_scales(self, like: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation of each channel, in fp32."""
        facts = (self.config.latents_mean, self.config.latents_std)
        mean, std = (torch.tensor(fact, dtype=torch.float32, device=like.device) for fact in facts)
        return mean[:, None, None, None], std[:, None, None, None]


class WanAutoencoder(CausalAutoencoder):
    """Of 16 channels, 8 times smaller, 4 times fewer frames. Parameter names are those of `Wan2.1_VAE.pth`."""

    def __init__(self, config: WanAutoencoderConfig) -> None:
        super().__init__(config, _encoder(config), _decoder(config))


def _encoder(config: WanAutoencoderConfig) -> Encoder:
    widths = [config.dim * multiple for multiple in (1, *config.dim_mult)]
    blocks: list[nn.Module] = []
    for level, (in_dim, dim) in enumerate(pairwise(widths)):
        blocks += [ResidualBlock(dim if index else in_dim, dim) for index in range(config.num_res_blocks)]
        if level < len(config.temporal_downsample):
            blocks.append(Downsample(dim, in_time=config.temporal_downsample[level]))
    moments = 2 * config.latent_channels
    return Encoder(config.in_channels, moments, in_dim=widths[0], blocks=blocks, dim=widths[-1])


def _decoder(config: WanAutoencoderConfig) -> Decoder:
    widths = [config.dim * multiple for multiple in config.dim_mult[::-1]]
    blocks: list[nn.Module] = []
    in_dim = widths[0]
    for level, dim in enumerate(widths):
        blocks += [ResidualBlock(dim if index else in_dim, dim) for index in range(config.num_res_blocks + 1)]
        if level < len(config.temporal_downsample):
            in_dim = dim // 2
            blocks.append(Upsample(dim, in_dim, in_time=config.temporal_downsample[::-1][level]))
    return Decoder(config.latent_channels, config.in_channels, in_dim=widths[0], blocks=blocks, dim=widths[-1])


def _latent_size(piece: Tensor, scale: int) -> tuple[int, int]:
    height, width = piece.shape[-2:]
    if height % scale or width % scale:
        raise ValueError(f"video is {height}x{width}; expected multiples of {scale}")
    return height // scale, width // scale


def _with_last(pieces: Iterable[Tensor]) -> Iterator[tuple[Tensor, bool]]:
    """Each piece, and whether it is the last one."""
    waiting = None
    for piece in pieces:
        if waiting is not None:
            yield waiting, False
        waiting = piece
    if waiting is not None:
        yield waiting, True


def _too_many(cache: FrameCache, count: int, device: torch.device) -> bool:
    """Whether as many such caches, now after their first piece, would take more than half of what is free."""
    free = devices.available_memory(device) if count > 1 and device.type != "meta" else None
    # After one frame a cache is half full.
    return free is not None and 2 * cache.nbytes * count > free // 2
