"""FLUX.2's image autoencoder: FLUX.1's blocks, latents packed 2 x 2 and normalised (Black Forest Labs 2025)."""

from __future__ import annotations

from typing import Unpack

import torch
from einops import rearrange
from jaxtyping import Float
from torch import Tensor, nn

from diffsynth.models.flux_autoencoder import Decoder, Encoder, image_tiles
from diffsynth.models.tiles import Tiling, tile_by_tile
from diffsynth_flux.flux2.config import Flux2AutoencoderConfig


class Flux2Autoencoder(nn.Module):
    """Autoencoder between images in [-1, 1] and packed, normalised latents; names are those of FLUX.2's `vae/` file."""

    def __init__(self, config: Flux2AutoencoderConfig) -> None:
        super().__init__()
        self.config = config
        self.encoder = Encoder(config.encoder)
        self.decoder = Decoder(config.decoder)
        self.quant_conv = nn.Conv2d(2 * config.latent_channels, 2 * config.latent_channels, 1)
        self.post_quant_conv = nn.Conv2d(config.latent_channels, config.latent_channels, 1)
        self.bn = LatentNorm(config)

    def encode(
        self,
        image: Float[Tensor, "b c_in h16 w16"],
        *,
        generator: torch.Generator | None = None,
        **tiling: Unpack[Tiling],
    ) -> Float[Tensor, "b c h w"]:
        """Return the packed and normalised latents of images, in the dtype of `image`: the posterior's mean, or a
        sample with `generator`.

        Args:
            image: pixels in [-1, 1]; height and width are multiples of `config.factor`.
            generator: samples from the posterior; None takes its mean, as image-to-image does.
            tiling: see `Tiling`, in latent pixels before packing, which are 8 image pixels; by default, tiles are 64
                latent pixels wide and 48 apart.

        Raises:
            ValueError: height or width is no multiple of the factor, or tiles would leave gaps.
        """
        mean, logvar = self.encode_moments(image, **tiling)
        if generator is not None:
            noise = torch.randn(mean.shape, generator=generator, device=generator.device, dtype=mean.dtype)
            mean = mean + (0.5 * logvar).exp() * noise.to(mean.device)
        patch = self.config.patch_size
        return self.bn(rearrange(mean, "b c (h p) (w q) -> b (c p q) h w", p=patch, q=patch))

    def encode_moments(
        self, image: Float[Tensor, "b c_in h16 w16"], **tiling: Unpack[Tiling]
    ) -> tuple[Float[Tensor, "b c h2 w2"], Float[Tensor, "b c h2 w2"]]:
        """Return two tensors of latents `b c h2 w2` before packing, the mean and the log-variance (clamped to
        [-30, 20]) of their posterior.

        Raises:
            ValueError: height or width is no multiple of the factor, or tiles would leave gaps.
        """
        (height, width), factor = image.shape[-2:], self.config.factor
        if height % factor or width % factor:
            raise ValueError(f"image is {height}x{width}; expected multiples of {factor}")
        pixels = self.config.encoder.factor
        tiles = image_tiles(height // pixels, width // pixels, tiling)
        moments = tile_by_tile(lambda tile: self.quant_conv(self.encoder(tile)), image, tiles, (pixels, 1))
        mean, logvar = moments.chunk(2, dim=1)
        return mean, logvar.clamp(-30.0, 20.0)

    def decode(self, latents: Float[Tensor, "b c h w"], **tiling: Unpack[Tiling]) -> Float[Tensor, "b c_in h16 w16"]:
        """Return the images of packed latents as a tensor with values about in [-1, 1], not clamped; `tiling` and
        errors as in `encode`.
        """
        patch = self.config.patch_size
        unpacked = rearrange(self.bn(latents, inverse=True), "b (c p q) h w -> b c (h p) (w q)", p=patch, q=patch)
        tiles = image_tiles(*unpacked.shape[-2:], tiling)
        scales = (1, self.config.decoder.factor)
        return tile_by_tile(lambda tile: self.decoder(self.post_quant_conv(tile)), unpacked, tiles, scales)

    def forward(self, image: Float[Tensor, "b c_in h16 w16"]) -> Float[Tensor, "b c_in h16 w16"]:
        """Return the images after encoding (to the mean of the posterior) and decoding, a tensor of the shape of
        `image`.
        """
        return self.decode(self.encode(image))


class LatentNorm(nn.Module):
    """Normalisation of packed latents by the mean and variance of each channel over the training data.

    The statistics are buffers under the names of a batch norm, as published; nothing updates them.
    """

    def __init__(self, config: Flux2AutoencoderConfig) -> None:
        super().__init__()
        self.eps = config.norm_eps
        self.register_buffer("running_mean", torch.zeros(config.packed_channels))
        self.register_buffer("running_var", torch.ones(config.packed_channels))
        self.register_buffer("num_batches_tracked", torch.tensor(0, dtype=torch.long))

    def forward(self, latents: Float[Tensor, "b c h w"], *, inverse: bool = False) -> Float[Tensor, "b c h w"]:
        """Return `(latents - mean) / std`, a tensor of the shape and dtype of `latents`; with `inverse`,
        `latents * std + mean`.
        """
        mean = self.running_mean.float()[:, None, None]
        std = (self.running_var.float() + self.eps).sqrt()[:, None, None]
        out = latents.float() * std + mean if inverse else (latents.float() - mean) / std
        return out.to(latents.dtype)
