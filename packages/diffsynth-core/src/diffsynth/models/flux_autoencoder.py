"""Image autoencoder of FLUX.1 and Z-Image (Esser et al. 2024, arXiv:2403.03206; VQGAN, arXiv:2012.09841)."""

from __future__ import annotations

from typing import Unpack

import torch
import torch.nn.functional as F
from einops import rearrange
from jaxtyping import Float
from torch import Tensor, nn

from diffsynth.core.attention import attention
from diffsynth.models.config import FluxAutoencoderConfig
from diffsynth.models.tiles import Tile, Tiling, cover, tile_by_tile

TILE_SIZE, TILE_STRIDE = 64, 48
"""Default side and distance of tiles in latent pixels: tiles of 512 pixels that overlap by 128."""


class FluxAutoencoder(nn.Module):
    """Autoencoder between images in [-1, 1] and scaled latents. Parameter names are those of Z-Image's `vae/` file."""

    def __init__(self, config: FluxAutoencoderConfig) -> None:
        super().__init__()
        self.config = config
        self.encoder = Encoder(config)
        self.decoder = Decoder(config)

    def encode(
        self,
        image: Float[Tensor, "b c_in h8 w8"],
        *,
        generator: torch.Generator | None = None,
        **tiling: Unpack[Tiling],
    ) -> Float[Tensor, "b c h w"]:
        """Return the scaled latents of images, a tensor `(z - shift_factor) * scaling_factor` in the dtype of `image`;
        `z` is the posterior's mean, or a sample with `generator`.

        Args:
            image: pixels in [-1, 1]; height and width are multiples of `config.factor`.
            generator: samples from the posterior; None takes its mean, as image-to-image does.
            tiling: see `Tiling`; by default, tiles are 64 latent pixels wide and 48 apart. Several tiles give other
                latents than the whole image, because norms and attention span one tile only.

        Raises:
            ValueError: height or width is no multiple of the factor, or tiles would leave gaps.
        """
        mean, logvar = self.encode_moments(image, **tiling)
        if generator is not None:
            noise = torch.randn(mean.shape, generator=generator, device=generator.device, dtype=mean.dtype)
            mean = mean + (0.5 * logvar).exp() * noise.to(mean.device)
        return (mean - self.config.shift_factor) * self.config.scaling_factor

    def encode_moments(
        self, image: Float[Tensor, "b c_in h8 w8"], **tiling: Unpack[Tiling]
    ) -> tuple[Float[Tensor, "b c h w"], Float[Tensor, "b c h w"]]:
        """Return two tensors of *unscaled* latents `b c h w`, the mean and the log-variance (clamped to [-30, 20]) of
        their posterior.

        Raises:
            ValueError: height or width is no multiple of the factor, or tiles would leave gaps.
        """
        height, width = image.shape[-2:]
        factor = self.config.factor
        if height % factor or width % factor:
            raise ValueError(f"image is {height}x{width}; expected multiples of {factor}")
        tiles = image_tiles(height // factor, width // factor, tiling)
        mean, logvar = tile_by_tile(self.encoder, image, tiles, (factor, 1)).chunk(2, dim=1)
        return mean, logvar.clamp(-30.0, 20.0)

    def decode(self, latents: Float[Tensor, "b c h w"], **tiling: Unpack[Tiling]) -> Float[Tensor, "b c_in h8 w8"]:
        """Return the images of scaled latents as a tensor with values about in [-1, 1], not clamped; `tiling` and
        errors as in `encode`.
        """
        unscaled = latents / self.config.scaling_factor + self.config.shift_factor
        tiles = image_tiles(*latents.shape[-2:], tiling)
        return tile_by_tile(self.decoder, unscaled, tiles, (1, self.config.factor))

    def forward(self, image: Float[Tensor, "b c_in h8 w8"]) -> Float[Tensor, "b c_in h8 w8"]:
        """Return the images after encoding (to the mean of the posterior) and decoding, a tensor of the shape of
        `image`.
        """
        return self.decode(self.encode(image))

    def init_weights(self) -> None:
        """Set the last layer of every residual branch to zero, for training from scratch (Fixup, arXiv:1901.09321);
        other weights are unchanged.
        """
        for module in self.modules():
            if isinstance(module, ResidualBlock):
                nn.init.zeros_(module.conv2.weight)
                nn.init.zeros_(module.conv2.bias)
            elif isinstance(module, PixelAttention):
                nn.init.zeros_(module.to_out[0].weight)
                nn.init.zeros_(module.to_out[0].bias)


class Encoder(nn.Module):
    """Encoder from an image to mean and log-variance of the latents, stacked along the channels."""

    def __init__(self, config: FluxAutoencoderConfig) -> None:
        super().__init__()
        widths = config.block_out_channels
        self.conv_in = nn.Conv2d(config.in_channels, widths[0], 3, padding=1)
        self.down_blocks = nn.ModuleList(
            DownBlock(config, widths[max(level - 1, 0)], width, downsample=level < len(widths) - 1)
            for level, width in enumerate(widths)
        )
        self.mid_block = MidBlock(config, widths[-1])
        self.conv_norm_out = _norm(config, widths[-1])
        self.conv_out = nn.Conv2d(widths[-1], 2 * config.latent_channels, 3, padding=1)

    def forward(self, image: Float[Tensor, "b c_in h8 w8"]) -> Float[Tensor, "b two_c h w"]:
        """Return one tensor `b two_c h w`: the mean, then the log-variance of the images' unscaled latents, stacked
        along the channels.
        """
        x = self.conv_in(_channels_last_on_cpu(image))
        for block in self.down_blocks:
            x = block(x)
        return self.conv_out(F.silu(self.conv_norm_out(self.mid_block(x))))


class Decoder(nn.Module):
    """Decoder from unscaled latents to an image."""

    def __init__(self, config: FluxAutoencoderConfig) -> None:
        super().__init__()
        widths = config.block_out_channels[::-1]
        self.conv_in = nn.Conv2d(config.latent_channels, widths[0], 3, padding=1)
        self.mid_block = MidBlock(config, widths[0])
        self.up_blocks = nn.ModuleList(
            UpBlock(config, widths[max(level - 1, 0)], width, upsample=level < len(widths) - 1)
            for level, width in enumerate(widths)
        )
        self.conv_norm_out = _norm(config, widths[-1])
        self.conv_out = nn.Conv2d(widths[-1], config.in_channels, 3, padding=1)

    def forward(self, latents: Float[Tensor, "b c h w"]) -> Float[Tensor, "b c_in h8 w8"]:
        """Return the decoded images of unscaled latents as a tensor `b c_in h8 w8`."""
        x = self.mid_block(self.conv_in(_channels_last_on_cpu(latents)))
        for block in self.up_blocks:
            x = block(x)
        return self.conv_out(F.silu(self.conv_norm_out(x)))


def _channels_last_on_cpu(x: Tensor) -> Tensor:
    """Return `x`, with channels last in memory if it is bf16 or fp16 on a CPU; the layers after it keep that layout.

    On CPUs without instructions for bf16, convolutions of it take a tenth of the time.
    """
    if x.device.type != "cpu" or x.dtype.itemsize != 2:
        return x
    return x.contiguous(memory_format=torch.channels_last)


class DownBlock(nn.Module):
    """Residual blocks of one resolution of the encoder and, except at the last one, downsampling."""

    def __init__(self, config: FluxAutoencoderConfig, in_dim: int, dim: int, *, downsample: bool) -> None:
        super().__init__()
        self.resnets = nn.ModuleList(
            ResidualBlock(config, dim if index else in_dim, dim) for index in range(config.layers_per_block)
        )
        self.downsamplers = nn.ModuleList([Downsample(dim)] if downsample else [])

    def forward(self, x: Float[Tensor, "b c_in h w"]) -> Float[Tensor, "b c h2 w2"]:
        """Return the features `b c h2 w2` after this block: at half the height and width of `x`, or at the same size if
        it is the encoder's last block.
        """
        for layer in (*self.resnets, *self.downsamplers):
            x = layer(x)
        return x


class UpBlock(nn.Module):
    """Residual blocks of one resolution of the decoder and, except at the last one, upsampling."""

    def __init__(self, config: FluxAutoencoderConfig, in_dim: int, dim: int, *, upsample: bool) -> None:
        super().__init__()
        self.resnets = nn.ModuleList(
            ResidualBlock(config, dim if index else in_dim, dim) for index in range(config.layers_per_block + 1)
        )
        self.upsamplers = nn.ModuleList([Upsample(dim)] if upsample else [])

    def forward(self, x: Float[Tensor, "b c_in h w"]) -> Float[Tensor, "b c h2 w2"]:
        """Return the features `b c h2 w2` after this block: at twice the height and width of `x`, or at the same size
        if it is the decoder's last block.
        """
        for layer in (*self.resnets, *self.upsamplers):
            x = layer(x)
        return x


class MidBlock(nn.Module):
    """Residual block, attention and residual block at the lowest resolution."""

    def __init__(self, config: FluxAutoencoderConfig, dim: int) -> None:
        super().__init__()
        self.attentions = nn.ModuleList([PixelAttention(config, dim)])
        self.resnets = nn.ModuleList(ResidualBlock(config, dim, dim) for _ in range(2))

    def forward(self, x: Float[Tensor, "b c h w"]) -> Float[Tensor, "b c h w"]:
        """Return the features `b c h w` after this block, of the shape of `x`."""
        return self.resnets[1](self.attentions[0](self.resnets[0](x)))


class ResidualBlock(nn.Module):
    """Residual block of two convolutions, each after norm and SiLU."""

    def __init__(self, config: FluxAutoencoderConfig, in_dim: int, dim: int) -> None:
        super().__init__()
        self.norm1 = _norm(config, in_dim)
        self.conv1 = nn.Conv2d(in_dim, dim, 3, padding=1)
        self.norm2 = _norm(config, dim)
        self.conv2 = nn.Conv2d(dim, dim, 3, padding=1)
        self.conv_shortcut = nn.Identity() if in_dim == dim else nn.Conv2d(in_dim, dim, 1)

    def forward(self, x: Float[Tensor, "b c_in h w"]) -> Float[Tensor, "b c h w"]:
        """Return the features `b c h w` after this residual block, at the height and width of `x`."""
        h = self.conv1(F.silu(self.norm1(x)))
        return self.conv_shortcut(x) + self.conv2(F.silu(self.norm2(h)))


class PixelAttention(nn.Module):
    """Single-head self-attention over all pixels, with a residual connection."""

    def __init__(self, config: FluxAutoencoderConfig, dim: int) -> None:
        super().__init__()
        self.group_norm = _norm(config, dim)
        self.to_q = nn.Linear(dim, dim)
        self.to_k = nn.Linear(dim, dim)
        self.to_v = nn.Linear(dim, dim)
        self.to_out = nn.Sequential(nn.Linear(dim, dim))

    def forward(self, x: Float[Tensor, "b c h w"]) -> Float[Tensor, "b c h w"]:
        """Return the tensor `x` plus the self-attention output over its pixels, in the shape of `x`."""
        tokens = rearrange(self.group_norm(x), "b c h w -> b (h w) c")
        q, k, v = (to(tokens)[:, :, None] for to in (self.to_q, self.to_k, self.to_v))
        h = self.to_out(attention(q, k, v)[:, :, 0])
        return x + rearrange(h, "b (h w) c -> b c h w", h=x.shape[2])


class Downsample(nn.Module):
    """Downsampling to half the resolution by a strided convolution."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(dim, dim, 3, stride=2)

    def forward(self, x: Float[Tensor, "b c h w"]) -> Float[Tensor, "b c h2 w2"]:
        """Return the features `b c h2 w2` at half the height and width of `x`."""
        # The network was trained with padding on the right and at the bottom only.
        return self.conv(F.pad(x, (0, 1, 0, 1)))


class Upsample(nn.Module):
    """Upsampling to twice the resolution by repeating pixels, then a convolution."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(dim, dim, 3, padding=1)

    def forward(self, x: Float[Tensor, "b c h w"]) -> Float[Tensor, "b c h2 w2"]:
        """Return the features `b c h2 w2` at twice the height and width of `x`."""
        return self.conv(F.interpolate(x, scale_factor=2.0, mode="nearest"))


def _norm(config: FluxAutoencoderConfig, dim: int) -> nn.GroupNorm:
    return nn.GroupNorm(config.norm_groups, dim, eps=1e-6)


def image_tiles(height: int, width: int, tiling: Tiling) -> list[Tile]:
    """Return a list of `Tile`s that cover the latents of an image, of equal size; those of a call by default.

    Args:
        height, width: size of the latents in latent pixels.
        tiling: the arguments of the call.

    Raises:
        ValueError: a size or stride is not positive, or the stride leaves gaps.
    """
    size: Tiling = {"tile_size": (TILE_SIZE, TILE_SIZE), "tile_stride": (TILE_STRIDE, TILE_STRIDE)}
    return cover(height, width, even=True, **(size | tiling))
