"""Residual video autoencoder of Wan 2.2 (TI2V-5B; Wan 2025, arXiv:2503.20314).

The layers are those of Wan 2.1's autoencoder (`diffsynth.models.wan_autoencoder`). Each resolution has a shortcut
without parameters, which averages or repeats pixels (DC-AE, arXiv:2410.10733), and frames are patchified into squares.
"""

from __future__ import annotations

from itertools import pairwise

import torch.nn.functional as F
from einops import rearrange, reduce, repeat
from jaxtyping import Float
from torch import Tensor, nn

from diffsynth.models.causal_video import (
    CausalLayer,
    CausalSequential,
    Decoder,
    Downsample,
    Encoder,
    FrameCache,
    ResidualBlock,
    Upsample,
)
from diffsynth.models.wan_autoencoder import CausalAutoencoder
from diffsynth_wan.config import Wan22AutoencoderConfig


class Wan22Autoencoder(CausalAutoencoder):
    """Autoencoder with 48 latent channels that compresses 16 x 16 pixels and 4 frames.

    Parameter names are those of `Wan2.2_VAE.pth`.
    """

    def __init__(self, config: Wan22AutoencoderConfig) -> None:
        super().__init__(config, _encoder(config), _decoder(config))

    def patchify(self, video: Float[Tensor, "b c_in t h w"]) -> Float[Tensor, "b c2 t h2 w2"]:
        """Return the video `b c2 t h2 w2` with squares of pixels folded into channels, column by column."""
        return rearrange(
            video, "b c t (h p) (w q) -> b (c q p) t h w", p=self.config.patch_size, q=self.config.patch_size
        )

    def unpatchify(self, patches: Float[Tensor, "b c2 t h2 w2"]) -> Float[Tensor, "b c_in t h w"]:
        """Return the video `b c t h w` whose squares of pixels `patchify` folded into channels."""
        return rearrange(
            patches, "b (c q p) t h w -> b c t (h p) (w q)", p=self.config.patch_size, q=self.config.patch_size
        )


class DownBlock(CausalLayer):
    """Residual blocks of one resolution of the encoder and downsampling, with a shortcut that averages pixels.

    Args:
        step: None at the last resolution, without downsampling; else whether it also halves the frames.
    """

    def __init__(self, in_dim: int, dim: int, *, num_res_blocks: int, step: bool | None) -> None:
        super().__init__()
        blocks: list[nn.Module] = [ResidualBlock(dim if index else in_dim, dim) for index in range(num_res_blocks)]
        if step is not None:
            blocks.append(Downsample(dim, in_time=step))
        self.downsamples = CausalSequential(*blocks)
        self.dim = dim
        self.side = 1 if step is None else 2
        self.frames = 2 if step else 1

    def forward(self, x: Float[Tensor, "b c t h w"], cache: FrameCache) -> Float[Tensor, "b c2 t2 h2 w2"]:
        """Return the features `b c2 t2 h2 w2` at half the height and width and, if this block halves frames, half the
        frames (a video's first frame stays one); at the last resolution, `t h w` are unchanged.
        """
        return self.downsamples(x, cache) + self._averaged(x, cache)

    def _averaged(self, x: Tensor, cache: FrameCache) -> Tensor:
        if cache.is_first:
            # The first frame is not paired with another one: it is averaged with zeros.
            x = F.pad(x, (0, 0, 0, 0, self.frames - 1, 0))
        cells = rearrange(x, "b c (t f) (h p) (w q) -> b (c f p q) t h w", f=self.frames, p=self.side, q=self.side)
        return reduce(cells, "b (c n) t h w -> b c t h w", "mean", c=self.dim)


class UpBlock(CausalLayer):
    """Residual blocks of one resolution of the decoder and upsampling, with a shortcut that repeats pixels.

    Args:
        step: None at the last resolution, without upsampling and shortcut; else whether it also doubles the frames.
    """

    def __init__(self, in_dim: int, dim: int, *, num_res_blocks: int, step: bool | None) -> None:
        super().__init__()
        blocks: list[nn.Module] = [ResidualBlock(dim if index else in_dim, dim) for index in range(num_res_blocks)]
        if step is not None:
            blocks.append(Upsample(dim, dim, in_time=step))
        self.upsamples = CausalSequential(*blocks)
        self.dim = dim
        self.has_shortcut = step is not None
        self.frames = 2 if step else 1

    def forward(self, x: Float[Tensor, "b c t h w"], cache: FrameCache) -> Float[Tensor, "b c2 t2 h2 w2"]:
        """Return the features `b c2 t2 h2 w2` at twice the height and width and, if this block doubles frames, twice
        the frames (a video's first frame stays one); at the last resolution, `t h w` are unchanged.
        """
        h = self.upsamples(x, cache)
        return h + self._repeated(x, cache) if self.has_shortcut else h

    def _repeated(self, x: Tensor, cache: FrameCache) -> Tensor:
        copies = self.dim * self.frames * 4 // x.shape[1]
        cells = repeat(x, "b c t h w -> b (c n) t h w", n=copies)
        larger = rearrange(cells, "b (c f p q) t h w -> b c (t f) (h p) (w q)", c=self.dim, f=self.frames, p=2, q=2)
        return larger[:, :, self.frames - 1 :] if cache.is_first else larger


def _encoder(config: Wan22AutoencoderConfig) -> Encoder:
    widths = [config.dim * multiple for multiple in (1, *config.dim_mult)]
    steps = (*config.temporal_downsample, None)
    blocks = [
        DownBlock(in_dim, dim, num_res_blocks=config.num_res_blocks, step=step)
        for (in_dim, dim), step in zip(pairwise(widths), steps, strict=True)
    ]
    channels = config.in_channels * config.patch_size**2
    return Encoder(channels, 2 * config.latent_channels, in_dim=widths[0], blocks=blocks, dim=widths[-1])


def _decoder(config: Wan22AutoencoderConfig) -> Decoder:
    widths = [config.decoder_dim * multiple for multiple in (config.dim_mult[-1], *config.dim_mult[::-1])]
    steps = (*config.temporal_downsample[::-1], None)
    blocks = [
        UpBlock(in_dim, dim, num_res_blocks=config.num_res_blocks + 1, step=step)
        for (in_dim, dim), step in zip(pairwise(widths), steps, strict=True)
    ]
    channels = config.in_channels * config.patch_size**2
    return Decoder(config.latent_channels, channels, in_dim=widths[0], blocks=blocks, dim=widths[-1])
