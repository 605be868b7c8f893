"""Causal video autoencoder of Wan 2.1 and Qwen-Image (Wan 2025, arXiv:2503.20314), and a base class for Wan 2.2's."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from itertools import pairwise
from typing import Any, Unpack

import torch
from jaxtyping import Float
from torch import Tensor, nn

from diffsynth.core import device as devices
from diffsynth.core.progress import track
from diffsynth.core.repeats import repeated
from diffsynth.models.causal_video import Decoder, Downsample, Encoder, FrameCache, ResidualBlock, Upsample
from diffsynth.models.config import WanAutoencoderConfig
from diffsynth.models.tiles import Blend, Tile, Tiling, cover


class CausalAutoencoder(nn.Module):
    """Autoencoder between videos in [-1, 1] and scaled latents, with memory that does not grow with their length.

    The first frame becomes the first latent frame, each `config.time_factor` further frames another one; an image is a
    video of one frame. A subclass builds encoder and decoder for its config, which has `factor`, `time_factor`,
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
        video: Float[Tensor, "b c_in *t4 h8 w8"],
        *,
        latents_per_piece: int = 1,
        **tiling: Unpack[Tiling],
    ) -> Float[Tensor, "b c *t h w"]:
        """Return the scaled latents of a video, a tensor `(mean - latents_mean) / latents_std` in the dtype of `video`.

        Args:
            video: pixels in [-1, 1]; `config.time_factor * k + 1` frames, sides that are multiples of `config.factor`.
                An image `b c_in h8 w8` is a video of one frame, and so are its latents `b c h w`.
            latents_per_piece: latent frames computed at once. Memory grows with it, and rounding depends on it.
            tiling: see `Tiling`.

        Raises:
            ValueError: the number of frames or a side does not fit, or tiles would leave gaps.
        """
        if video.ndim == 4:
            return self.encode(video[:, :, None], **tiling).squeeze(2)
        pieces = self.split_video(video, latents_per_piece)
        encoded = self.encode_pieces(track(pieces, total=len(pieces), unit="pieces"), **tiling)
        return torch.cat(list(encoded), dim=2)

    def decode(
        self,
        latents: Float[Tensor, "b c *t h w"],
        *,
        latents_per_piece: int = 1,
        **tiling: Unpack[Tiling],
    ) -> Float[Tensor, "b c_in *t4 h8 w8"]:
        """Return the video of scaled latents, or the image of latents `b c h w`, as a tensor with values about in [-1,
        1], not clamped; other arguments as in `encode`.
        """
        if latents.ndim == 4:
            return self.decode(latents[:, :, None], **tiling).squeeze(2)
        pieces = latents.split(latents_per_piece, dim=2)
        decoded = self.decode_pieces(track(pieces, total=len(pieces), unit="pieces"), **tiling)
        first = next(decoded)
        frames = self.config.time_factor * (latents.shape[2] - 1) + 1
        # Write each piece into its slice: torch.cat at the end would hold the video twice.
        video = first.new_empty((*first.shape[:2], frames, *first.shape[3:]))
        video[:, :, : first.shape[2]] = first
        start = first.shape[2]
        for piece in decoded:
            video[:, :, start : start + piece.shape[2]] = piece
            start += piece.shape[2]
        return video

    def encode_pieces(
        self, pieces: Iterable[Float[Tensor, "b c_in t4 h8 w8"]], **tiling: Unpack[Tiling]
    ) -> Iterator[Float[Tensor, "b c t h w"]]:
        """Yield a tensor of scaled latents `b c t h w` for each piece (consecutive frames) of a video, in order.

        Args:
            pieces: consecutive frames: first `config.time_factor * k + 1`, then multiples of `config.time_factor`.
            tiling: see `Tiling`.

        Raises:
            ValueError: the number of frames or a side does not fit, or tiles would leave gaps.
        """
        for moments in self._streamed(self._encode_piece, pieces, self.config.factor, 1, tiling):
            mean, _ = moments.chunk(2, dim=1)
            shift, scale = self._latent_scales(mean)
            yield ((mean - shift) / scale).to(mean.dtype)

    def encode_moments(
        self, video: Float[Tensor, "b c_in t4 h8 w8"]
    ) -> tuple[Float[Tensor, "b c t h w"], Float[Tensor, "b c t h w"]]:
        """Return two tensors of *unscaled* latents `b c t h w`, the mean and the log-variance (clamped to [-30, 20]) of
        their posterior.

        Raises:
            ValueError: the number of frames or a side does not fit.
        """
        encoded = self._streamed(self._encode_piece, self.split_video(video), self.config.factor, 1, {})
        mean, logvar = torch.cat(list(encoded), dim=2).chunk(2, dim=1)
        return mean, logvar.clamp(-30.0, 20.0)

    def decode_pieces(
        self, pieces: Iterable[Float[Tensor, "b c t h w"]], **tiling: Unpack[Tiling]
    ) -> Iterator[Float[Tensor, "b c_in t4 h8 w8"]]:
        """Return an iterator over tensors of frames, one for each piece of scaled latents, such as those of
        `latents.split(1, dim=2)`.

        The first latent frame gives one frame, each further one `config.time_factor` frames.

        Raises:
            ValueError: tiles would leave gaps.
        """
        return self._streamed(self._decode_piece, pieces, 1, self.config.factor, tiling)

    def split_video(
        self, video: Float[Tensor, "b c_in t4 h8 w8"], latents_per_piece: int = 1
    ) -> list[Float[Tensor, "b c_in t4_piece h8 w8"]]:
        """Return a list of views of `video`, its pieces of consecutive frames for `encode_pieces`, each of
        `latents_per_piece` latent frames (the last may have fewer).

        Raises:
            ValueError: the number of frames does not fit.
        """
        factor, frames = self.config.time_factor, video.shape[2]
        if frames % factor != 1 % factor:
            raise ValueError(f"video has {frames} frames; expected one more than a multiple of {factor}")
        first = factor * (latents_per_piece - 1) + 1
        head, later = video[:, :, :first], video[:, :, first:]
        return [head, *(later.split(factor * latents_per_piece, dim=2) if later.shape[2] else ())]

    def forward(self, video: Float[Tensor, "b c_in t4 h8 w8"]) -> Float[Tensor, "b c_in t4 h8 w8"]:
        """Return the video after encoding (to the mean of the posterior) and decoding, a tensor of the shape of
        `video`.
        """
        return self.decode(self.encode(video))

    def patchify(self, video: Float[Tensor, "b c_in t h w"]) -> Float[Tensor, "b c2 t h2 w2"]:
        """Return the encoder's input for frames; in this class the tensor `video` itself."""
        return video

    def unpatchify(self, patches: Float[Tensor, "b c2 t h2 w2"]) -> Float[Tensor, "b c_in t h w"]:
        """Return the frames for the decoder's output; in this class the tensor `patches` itself."""
        return patches

    def _streamed(
        self,
        run: Callable[[Tensor, FrameCache], Tensor],
        pieces: Iterable[Tensor],
        scale_in: int,
        scale_out: int,
        tiling: Tiling,
    ) -> Iterator[Tensor]:
        """Yield a tensor for each piece: the results of `run` for its tiles, blended; each tile has its own
        `FrameCache`.

        All tiles of a piece run before the next piece, so their caches exist at the same time. If these would take
        more than half of the free device memory, they are stored on the CPU between pieces.
        """
        tiles: list[Tile] = []
        caches: list[FrameCache] = []
        offload_caches: bool | None = None
        for piece, is_last in _with_last(pieces):
            height, width = _latent_size(piece, scale_in)
            if not tiles:
                tiles = cover(height, width, **tiling)
                caches = [FrameCache() for _ in tiles]
            blend = None
            for tile, cache in track(zip(tiles, caches, strict=True), total=len(tiles), unit="tiles"):
                cache.is_last = is_last
                if offload_caches:
                    cache.to(piece.device)
                part = repeated(run, tile.cut(piece, scale_in), cache)
                blend = blend or Blend(height, width, scale_out, like=part)
                blend.add(tile, part)
                cache.is_first = False
                if offload_caches is None:
                    offload_caches = _exceed_memory(cache, len(tiles), piece.device)
                if offload_caches:
                    cache.to("cpu")
            assert blend is not None
            yield blend.result()

    def _encode_piece(self, piece: Tensor, cache: FrameCache) -> Tensor:
        factor, frames = self.config.time_factor, piece.shape[2]
        if frames % factor != (1 % factor if cache.is_first else 0):
            expected = "one more than a multiple" if cache.is_first else "a multiple"
            raise ValueError(f"a piece has {frames} frames; expected {expected} of {factor}")
        return self.conv1(self.encoder(self.patchify(piece), cache))

    def _decode_piece(self, piece: Tensor, cache: FrameCache) -> Tensor:
        shift, scale = self._latent_scales(piece)
        latents = (piece * scale + shift).to(piece.dtype)
        return self.unpatchify(self.decoder(self.conv2(latents), cache))

    def _latent_scales(self, like: Tensor) -> tuple[Tensor, Tensor]:
        """Return two fp32 tensors `c 1 1 1`, the mean and the standard deviation of each latent channel, on the device
        of `like`.
        """
        scales = (self.config.latents_mean, self.config.latents_std)
        mean, std = (torch.tensor(scale, dtype=torch.float32, device=like.device) for scale in scales)
        return mean[:, None, None, None], std[:, None, None, None]


class WanAutoencoder(CausalAutoencoder):
    """Autoencoder with 16 latent channels that compresses 8 x 8 pixels and 4 frames.

    Parameter names are those of `Wan2.1_VAE.pth`.
    """

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
    """Yield (piece, whether it is the last one) for each of `pieces`, one piece behind."""
    previous = None
    for piece in pieces:
        if previous is not None:
            yield previous, False
        previous = piece
    if previous is not None:
        yield previous, True


def _exceed_memory(cache: FrameCache, count: int, device: torch.device) -> bool:
    """Whether `count` caches like `cache` (as it is after the first piece) would take more than half of the device's
    free memory; False for a single one, or if that is unknown.
    """
    free = devices.available_memory(device) if count > 1 and device.type != "meta" else None
    # After its first frame, a cache has half of its final size.
    return free is not None and 2 * cache.nbytes * count > free // 2
