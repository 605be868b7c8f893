"""Reference images of FLUX.1-Kontext (arXiv:2506.15742): their tokens are appended to those of the image."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, TypedDict

import torch
from jaxtyping import Float
from PIL import Image
from torch import Tensor

from diffsynth.core.data.color import to_rgb
from diffsynth.core.data.image import cover
from diffsynth.models.tiles import Tiling
from diffsynth.runtime.feature import Condition, Configs, Feature
from diffsynth.runtime.image_units import encode_each
from diffsynth.runtime.images import Images, image_list
from diffsynth.runtime.unit import Phase, unit
from diffsynth_flux.flux1.config import VAE_FACTOR
from diffsynth_flux.flux1.dit import grid_positions, patchify
from diffsynth_flux.flux1.extension import Network, Stream, with_image_tokens

MULTIPLE = 2 * VAE_FACTOR
"""Side of a token in pixels."""


class KontextArguments(TypedDict, total=False):
    """Reference images.

    Args:
        kontext_images: Image that the prompt says how to change, or several images, for FLUX.1-Kontext. Each keeps its
            size, rounded down to a multiple of 16.
    """

    kontext_images: Images


@dataclass(frozen=True, eq=False)
class References:
    """Extension that appends the tokens of reference images, all with the reference index 1.

    Args:
        latents: scaled latents of each image, of any size.
    """

    latents: tuple[Float[Tensor, "1 c h w"], ...]

    def __call__(self, dit: Network, stream: Stream) -> Stream:
        """Return the stream with the tokens appended; see `diffsynth_flux.flux1.extension.Extension`."""
        for latents in self.latents:
            height, width = latents.shape[2:]
            positions = grid_positions(height // 2, width // 2, index=1)
            stream = with_image_tokens(dit, stream, patchify(latents), positions)
        return stream


@unit("references", phase=Phase.ENCODE, only_with="kontext_images")
def encode_kontext_images(
    vae: Any,
    *,
    kontext_images: Images = None,
    tiling: Tiling,
    device: torch.device,
    dtype: torch.dtype,
) -> References:
    """Return `References` with the latents of the images, each of its own size, rounded down to a multiple of 16."""
    images = map(_sized, map(to_rgb, image_list(kontext_images)))  # upright, before their sides are read
    return References(encode_each(vae, images, tiling=tiling, device=device, dtype=dtype))


def _sized(image: Image.Image) -> Image.Image:
    width, height = (max(side // MULTIPLE, 1) * MULTIPLE for side in image.size)
    return cover(image, height, width, Image.Resampling.BICUBIC)


def check(configs: Configs, values: Mapping[str, Any]) -> None:
    """Raise an error for reference images with a network whose tokens have further channels.

    Raises:
        ValueError: the network takes an image to fill or a control image.
    """
    config = configs["dit"]
    if values["kontext_images"] is not None and config is not None and config.condition_channels:
        raise ValueError(
            f"kontext_images is given, but this network takes {config.condition_channels} channels beside those of the "
            "latents, which reference images do not have; load FLUX.1-Kontext-dev"
        )


KONTEXT = Feature(
    "kontext",
    arguments=KontextArguments,
    units=(encode_kontext_images,),
    conditions={"references": Condition("an image has no frames", batch="separate")},
    check=check,
)
