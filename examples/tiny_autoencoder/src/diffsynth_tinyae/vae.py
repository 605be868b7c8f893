"""The network: TAESD (Bohan 2023), convolutions and residual blocks without norms, for images in [-1, 1]."""

import torch
from torch import nn

from diffsynth.models.tiles import cover, tile_by_tile


class Block(nn.Module):
    """Residual block of three convolutions."""

    def __init__(self, width):
        super().__init__()
        convolutions = [nn.Conv2d(width, width, 3, padding=1) for _ in range(3)]
        self.conv = nn.Sequential(convolutions[0], nn.ReLU(), convolutions[1], nn.ReLU(), convolutions[2])

    def forward(self, x):
        """Return the features, `b c h w`."""
        return torch.relu(self.conv(x) + x)


class Encoder(nn.Module):
    """Encoder from images in [-1, 1] to scaled latents."""

    def __init__(self, config):
        super().__init__()
        width, layers = config.width, []
        for level, count in enumerate(config.encoder_blocks):
            halving = nn.Conv2d(width, width, 3, padding=1, stride=2, bias=False)
            layers.append(halving if level else nn.Conv2d(3, width, 3, padding=1))
            layers += [Block(width) for _ in range(count)]
        self.layers = nn.Sequential(*layers, nn.Conv2d(width, config.latent_channels, 3, padding=1))

    def forward(self, image):
        """Return the latents, `b c h w`."""
        return self.layers((image + 1) / 2)


class Decoder(nn.Module):
    """Decoder from scaled latents to images in [-1, 1]."""

    def __init__(self, config):
        super().__init__()
        width, layers = config.width, [nn.Conv2d(config.latent_channels, config.width, 3, padding=1), nn.ReLU()]
        for level, count in enumerate(config.decoder_blocks):
            if level:
                layers += [nn.Upsample(scale_factor=2), nn.Conv2d(width, width, 3, padding=1, bias=False)]
            layers += [Block(width) for _ in range(count)]
        self.layers = nn.Sequential(*layers, nn.Conv2d(width, 3, 3, padding=1))

    def forward(self, latents):
        """Return the images, `b 3 h w`; latents are limited to [-3, 3]."""
        return 2 * self.layers(3 * torch.tanh(latents / 3)) - 1


class TinyAutoencoder(nn.Module):
    """Autoencoder between images and scaled latents; has the methods that pipelines call of FLUX.1's autoencoder."""

    def __init__(self, config):
        super().__init__()
        self.config = config
        self.encoder = Encoder(config)
        self.decoder = Decoder(config)

    def encode(self, image, **tiling):
        """Return the scaled latents of images, `b c h w`; `tiling` is `diffsynth.models.tiles.Tiling`."""
        factor = self.config.factor
        tiles = cover(image.shape[-2] // factor, image.shape[-1] // factor, **tiling)
        return tile_by_tile(self.encoder, image, tiles, (factor, 1))

    def decode(self, latents, **tiling):
        """Return the images of scaled latents, `b 3 h w`; values are about in [-1, 1]."""
        tiles = cover(*latents.shape[-2:], **tiling)
        return tile_by_tile(self.decoder, latents, tiles, (1, self.config.factor))

    def forward(self, image):
        """Return the images after encoding and decoding."""
        return self.decode(self.encode(image))
