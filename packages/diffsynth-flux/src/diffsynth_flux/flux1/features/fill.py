"""Image to fill, for FLUX.1-Fill: its latents and a mask are channels beside those of the noised latents."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, TypedDict

import torch
from einops import rearrange
from jaxtyping import Float
from PIL import Image
from torch import Tensor

from diffsynth.core.data.image import ResizeMode
from diffsynth.models.tiles import Tiling
from diffsynth.runtime.feature import Condition, Configs, Feature, whole
from diffsynth.runtime.images import image_to_tensor, mask_to_tensor
from diffsynth.runtime.unit import Phase, unit
from diffsynth_flux.flux1.config import VAE_FACTOR

MASK_CHANNELS = VAE_FACTOR**2
"""Channels of a mask: one for each pixel of a latent pixel."""


class FillArguments(TypedDict, total=False):
    """Image to fill.

    Args:
        flux_fill_image: Image of which a part is replaced, for FLUX.1-Fill; scaled to the size of the result by
            `resize_mode`.
        flux_fill_mask: Image that is white where `flux_fill_image` is replaced.
    """

    flux_fill_image: Image.Image | None
    flux_fill_mask: Image.Image | None


@unit("fill_latents", phase=Phase.ENCODE, only_with="flux_fill_image")
def encode_fill_image(
    vae: Any,
    *,
    flux_fill_image: Image.Image | None = None,
    flux_fill_mask: Image.Image | None = None,
    height: int,
    width: int,
    resize_mode: ResizeMode,
    tiling: Tiling,
    device: torch.device,
    dtype: torch.dtype,
) -> Float[Tensor, "1 c_fill h w"]:
    """Return a tensor `1 c_fill h w`: the latents of the image with the masked part in grey, then the mask, a channel
    for each of the 8 x 8 pixels of a latent pixel, 1 where the image is replaced.
    """
    assert flux_fill_image is not None, "the unit runs only with it"
    assert flux_fill_mask is not None, "checked before anything was encoded"
    mask = mask_to_tensor(flux_fill_mask, height, width, resize_mode=resize_mode)
    kept = image_to_tensor(flux_fill_image, height, width, resize_mode=resize_mode) * (1 - mask)
    latents = vae.encode(kept.to(device, dtype), **tiling)
    channels = rearrange(mask, "b 1 (h p) (w q) -> b (p q) h w", p=VAE_FACTOR, q=VAE_FACTOR)
    return torch.cat((latents, channels.to(latents)), dim=1)


def check(configs: Configs, values: Mapping[str, Any]) -> None:
    """Raise an error for an image to fill that the network does not take, or that is missing.

    Raises:
        ValueError: one of image and mask is missing, or the network takes none, or needs one.
    """
    image, mask = values["flux_fill_image"], values["flux_fill_mask"]
    if (image is None) != (mask is None):
        raise ValueError("only one of flux_fill_image and flux_fill_mask is given; pass both")
    config = configs["dit"]
    if config is None:
        return
    takes = config.condition_channels == config.latent_channels + MASK_CHANNELS
    if image is not None and not takes:
        raise ValueError("flux_fill_image is given, but this network takes none; load FLUX.1-Fill-dev")
    if image is None and takes:
        raise ValueError("this network needs an image to fill; pass flux_fill_image and flux_fill_mask")


FILL = Feature(
    "fill",
    arguments=FillArguments,
    units=(encode_fill_image,),
    conditions={"fill_latents": Condition(whole)},
    check=check,
)
