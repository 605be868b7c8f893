"""Reference images of Z-Image-Omni-Base: their latents and features stand between segments of the caption.

The network is in `diffsynth_zimage.omni`; the prompt is encoded in segments by `diffsynth_zimage.units.encode_prompt`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, TypedDict

import torch
from jaxtyping import Float
from PIL import Image
from torch import Tensor

from diffsynth.core.data.color import to_rgb
from diffsynth.core.data.image import crop_to_multiple
from diffsynth.errors import MissingComponent
from diffsynth.models.tiles import Tiling
from diffsynth.runtime.feature import Condition, Configs, Feature
from diffsynth.runtime.image_units import encode_each
from diffsynth.runtime.images import Images, image_list
from diffsynth.runtime.role import Agreement, Role
from diffsynth.runtime.unit import Phase, unit
from diffsynth_zimage.config import ZImageOmniDiTConfig
from diffsynth_zimage.extension import OmniNetwork, Stream
from diffsynth_zimage.image_patches import siglip2_patches

ENCODER = "image_encoder"

MULTIPLE = 16
"""The sides of the latents' image are cut to multiples of this number of pixels."""

AREA = 1024 * 1024
"""Area, in pixels, above which automatic resizing scales a reference image down."""


class EditArguments(TypedDict, total=False):
    """Reference images of Z-Image-Omni-Base.

    Args:
        edit_image: Image to edit, or a list of reference images, which the prompt may mention by number. Every result
            gets all of them.
        edit_image_auto_resize: Whether an image of more than 1024 x 1024 pixels is scaled down to this area; in any
            case it is cropped to multiples of 16.
    """

    edit_image: Images
    edit_image_auto_resize: bool


@dataclass(frozen=True, eq=False)
class References:
    """Extension that appends reference images and their features.

    Args:
        images: scaled latents of each image; sizes may differ.
        features: hidden states of the image encoder for each image.
    """

    images: tuple[Float[Tensor, "1 c h w"], ...]
    features: tuple[Float[Tensor, "rows columns e"], ...]

    def __call__(self, dit: OmniNetwork, stream: Stream) -> Stream:
        """Return the stream with the references; see `diffsynth_zimage.omni.ZImageOmniDiT.append_references`."""
        return dit.append_references(stream, self.images, self.features)


@unit("references", phase=Phase.ENCODE, only_with="edit_image")
def encode_edit_images(
    vae: Any,
    image_encoder: Any,
    *,
    edit_image: Images = None,
    edit_image_auto_resize: bool = True,
    tiling: Tiling,
    device: torch.device,
    dtype: torch.dtype,
) -> References:
    """Return `References` with the latents and the features of the reference images."""
    images = [_scaled(image, auto_resize=edit_image_auto_resize) for image in map(to_rgb, image_list(edit_image))]
    latents = encode_each(
        vae,
        (crop_to_multiple(image, MULTIPLE) for image in images),
        tiling=tiling,
        device=device,
        dtype=dtype,
    )
    patches = (siglip2_patches(image, image_encoder.config).to(device, dtype) for image in images)
    return References(latents, tuple(image_encoder(each)[0] for each in patches))


def edit_size(image: Image.Image, *, auto_resize: bool) -> tuple[int, int]:
    """Return (height, width) in pixels to which a reference image is scaled before it is cropped: its own, or, if its
    area is above 1024 x 1024 and `auto_resize`, those of about this area.
    """
    if not auto_resize or image.height * image.width <= AREA:
        return image.height, image.width
    scale = (AREA / (image.height * image.width)) ** 0.5
    return int(image.height * scale), int(image.width * scale)


def _scaled(image: Image.Image, *, auto_resize: bool) -> Image.Image:
    height, width = edit_size(image, auto_resize=auto_resize)
    return image if image.size == (width, height) else image.resize((width, height), Image.Resampling.LANCZOS)


def check(configs: Configs, values: Mapping[str, Any]) -> None:
    """Raise an error for reference images that cannot be encoded.

    Raises:
        ValueError: the network takes no reference images, there are ControlNets, or an image is smaller than a token.
        MissingComponent: the image encoder is not loaded.
    """
    images = image_list(values["edit_image"])
    if not images:
        return
    if not isinstance(configs["dit"], ZImageOmniDiTConfig):
        raise ValueError("edit_image needs Z-Image-Omni-Base, and the loaded network takes no reference images")
    if configs[ENCODER] is None:
        raise MissingComponent(
            f"edit_image needs {ENCODER}; add siglip/model.safetensors of Z-Image-Omni-Base to model_configs"
        )
    if values.get("controlnet_inputs") is not None:
        raise ValueError("edit_image and controlnet_inputs cannot be combined; pass one of them")
    for image in images:
        size = edit_size(image, auto_resize=values["edit_image_auto_resize"])
        if min(size) < MULTIPLE:
            raise ValueError(
                f"edit_image has an image of {image.width}x{image.height} pixels; expected at least {MULTIPLE} on each "
                "side, after an image of a larger area than 1024 x 1024 is scaled down"
            )


EDIT = Feature(
    "edit",
    arguments=EditArguments,
    roles={ENCODER: Role(architectures=("siglip2_naflex_image_encoder",), optional=True)},
    agreements=(Agreement("width of image features", ("dit.siglip_feat_dim", f"{ENCODER}.hidden_size")),),
    units=(encode_edit_images,),
    conditions={"references": Condition("an image has no frames", batch="separate")},
    check=check,
)
