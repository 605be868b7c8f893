"""Sizes of the residual autoencoder, and how a file's shapes tell them. Light: no torch at import."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from diffsynth.models.config import WanAutoencoderConfig

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True, kw_only=True)
class Wan22AutoencoderConfig(WanAutoencoderConfig):
    """The autoencoder of Wan2.2-TI2V-5B. What is not said here is as in Wan 2.1's.

    Args:
        dim: width of the encoder at its first resolution.
        decoder_dim: width of the decoder at its last resolution.
        patch_size: side of the squares of pixels that become channels before the encoder and after the decoder.
    """

    latent_channels: int = 48
    dim: int = 160
    decoder_dim: int = 256
    patch_size: int = 2
    latents_mean: tuple[float, ...] = (
        -0.2289, -0.0052, -0.1323, -0.2339, -0.2799, 0.0174, 0.1838, 0.1557,
        -0.1382, 0.0542, 0.2813, 0.0891, 0.1570, -0.0098, 0.0375, -0.1825,
        -0.2246, -0.1207, -0.0698, 0.5109, 0.2665, -0.2108, -0.2158, 0.2502,
        -0.2055, -0.0322, 0.1109, 0.1567, -0.0729, 0.0899, -0.2799, -0.1230,
        -0.0313, -0.1649, 0.0117, 0.0723, -0.2839, -0.2083, -0.0520, 0.3748,
        0.0152, 0.1957, 0.1433, -0.2944, 0.3573, -0.0548, -0.1681, -0.0667,
    )  # fmt: skip
    latents_std: tuple[float, ...] = (
        0.4765, 1.0364, 0.4514, 1.1677, 0.5313, 0.4990, 0.4818, 0.5013,
        0.8158, 1.0344, 0.5894, 1.0901, 0.6885, 0.6165, 0.8454, 0.4978,
        0.5759, 0.3523, 0.7135, 0.6804, 0.5833, 1.4146, 0.8986, 0.5659,
        0.7069, 0.5338, 0.4889, 0.4917, 0.4069, 0.4999, 0.6866, 0.4093,
        0.5709, 0.6065, 0.6415, 0.4944, 0.5726, 1.2042, 0.5458, 1.6887,
        0.3971, 1.0600, 0.3943, 0.5537, 0.5444, 0.4089, 0.7468, 0.7744,
    )  # fmt: skip

    @property
    def factor(self) -> int:
        """Pixels per latent pixel, along one side."""
        return super().factor * self.patch_size


TINY_WAN22_AUTOENCODER = Wan22AutoencoderConfig(dim=8, decoder_dim=8)


def tiny_wan22_autoencoder_inputs(config: Wan22AutoencoderConfig, generator: torch.Generator) -> dict[str, Any]:
    """Arguments of `Wan22Autoencoder.forward`: a video of two latent frames that are not square; fp32 on the CPU."""
    import torch

    size = (config.time_factor + 1, 2 * config.factor, config.factor)
    return {"video": torch.rand(1, config.in_channels, *size, generator=generator) * 2 - 1}


def infer_wan22_autoencoder_config(shapes: Mapping[str, tuple[int, ...]]) -> Wan22AutoencoderConfig:
    """The config of a file, from its shapes under our own names.

    Raises:
        ValueError: it is another autoencoder of the same kind.
    """
    published = Wan22AutoencoderConfig()
    latent_channels = shapes["conv2.weight"][0]
    if latent_channels != published.latent_channels:
        raise ValueError(
            f"it has {latent_channels} latent channels; the means and deviations known here are of "
            f"{published.latent_channels}"
        )
    dim, patch_channels = shapes["encoder.conv1.weight"][:2]
    if patch_channels % published.patch_size**2:
        raise ValueError(f"its encoder takes {patch_channels} channels; expected pixels in squares of 2x2")
    levels = _counted(shapes, "encoder.downsamples.{}.downsamples.0.residual.2.weight")
    blocks = _counted(shapes, "encoder.downsamples.0.downsamples.{}.residual.2.weight")
    widths = [shapes[f"encoder.downsamples.{level}.downsamples.0.residual.2.weight"][0] for level in range(levels)]
    steps = [f"encoder.downsamples.{level}.downsamples.{blocks}.time_conv.weight" for level in range(levels - 1)]
    return Wan22AutoencoderConfig(
        in_channels=patch_channels // published.patch_size**2,
        dim=dim,
        decoder_dim=shapes["decoder.head.2.weight"][1],
        dim_mult=tuple(width // dim for width in widths),
        num_res_blocks=blocks,
        temporal_downsample=tuple(step in shapes for step in steps),
    )


def _counted(shapes: Mapping[str, tuple[int, ...]], name: str) -> int:
    """How many there are of a name, numbered from 0."""
    count = 0
    while name.format(count) in shapes:
        count += 1
    return count
