"""Image prompts with FLUX.1's IP-Adapter; the network is in `diffsynth_flux.flux1.ip_adapter`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, TypedDict

import torch
from jaxtyping import Float
from torch import Tensor

from diffsynth.errors import MissingComponent
from diffsynth.models.image_pixels import siglip_pixels
from diffsynth.runtime.feature import Condition, Configs, Feature
from diffsynth.runtime.images import Images, image_list
from diffsynth.runtime.role import Agreement, Role
from diffsynth.runtime.unit import Phase, unit
from diffsynth_flux.flux1.features.redux import ENCODER, ENCODER_ROLE
from diffsynth_flux.flux1.ip_adapter import ImagePrompt

ADAPTER = "ipadapter"


class IPAdapterArguments(TypedDict, total=False):
    """Image prompts.

    Args:
        ipadapter_images: Image that the result resembles, for FLUX.1-dev-IP-Adapter, or several; each is resized to a
            square for the image encoder. Every result gets all of them.
        ipadapter_scale: Factor of the attention to `ipadapter_images`; 0 is without them.
    """

    ipadapter_images: Images
    ipadapter_scale: float


@unit("image_states", "image_states_of_uncond", phase=Phase.ENCODE, requires=(ADAPTER,), only_with="ipadapter_images")
def encode_ipadapter_images(
    image_encoder: Any, *, ipadapter_images: Images = None, device: torch.device, dtype: torch.dtype
) -> tuple[Float[Tensor, "i e"], Float[Tensor, "i e"]]:
    """Return (pooled states `i e` of the images for the conditional branch of guidance, zeros of this shape for the
    unconditional).
    """
    side = image_encoder.config.image_size
    pixels = torch.cat([siglip_pixels(image, side) for image in image_list(ipadapter_images)])
    states = image_encoder(pixels.to(device, dtype), pooled=True)
    return states, torch.zeros_like(states)


@unit(
    "image_prompt",
    branches={"uncond": {"image_states": "image_states_of_uncond"}},
    phase=Phase.CONDITION,
    only_with="ipadapter_images",
)
def project_image_prompt(
    ipadapter: Any,
    *,
    ipadapter_images: Images = None,
    ipadapter_scale: float = 1.0,
    image_states: Float[Tensor, "i e"],
) -> ImagePrompt:
    """Return an `ImagePrompt` with the keys and values of the images for each block of the transformer."""
    return ImagePrompt(ipadapter(image_states), float(ipadapter_scale))


def check(configs: Configs, values: Mapping[str, Any]) -> None:
    """Raise MissingComponent for image prompts with an image encoder that cannot pool its states.

    Raises:
        MissingComponent: the image encoder has no pooling head.
    """
    encoder = configs[ENCODER]
    if values["ipadapter_images"] is not None and encoder is not None and not encoder.pooling_head:
        raise MissingComponent(
            "ipadapter_images needs an image encoder with its pooling head, and the loaded one has none; load "
            "google/siglip-so400m-patch14-384:model.safetensors"
        )


IP_ADAPTER = Feature(
    "ip_adapter",
    arguments=IPAdapterArguments,
    roles={ENCODER: ENCODER_ROLE, ADAPTER: Role(architectures=("flux_ip_adapter",), optional=True)},
    units=(encode_ipadapter_images, project_image_prompt),
    conditions={"image_prompt": Condition("an image has no frames", batch="separate")},
    check=check,
    agreements=(
        Agreement("width of the image encoder", (f"{ADAPTER}.image_dim", f"{ENCODER}.hidden_size")),
        Agreement("width of the tokens", (f"{ADAPTER}.dim", "dit.dim")),
        Agreement("head dimension", (f"{ADAPTER}.head_dim", "dit.head_dim")),
        Agreement("number of blocks", (f"{ADAPTER}.n_blocks", "dit.n_blocks")),
    ),
)
