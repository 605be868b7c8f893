"""Layers of an image (Qwen-Image-Layered): RGBA images that give it again if each is laid over those before it.

The network computes the image itself and its layers together, and gets the tokens of the image after theirs.
Qwen-Image-Layered-Control is the same network, trained to compute the one layer that the prompt describes.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, TypedDict

import torch
from jaxtyping import Float
from PIL import Image
from torch import Tensor

from diffsynth.core.data.image import ResizeMode
from diffsynth.models.tiles import Tiling
from diffsynth.runtime.feature import Condition, Configs, Feature
from diffsynth.runtime.images import check_alpha, image_to_tensor
from diffsynth.runtime.unit import Phase, unit
from diffsynth_qwen_image.extension import LAYER_INPUT, Network, Stream


class LayerArguments(TypedDict, total=False):
    """Image to take apart into layers, for Qwen-Image-Layered and networks that are made from it.

    Args:
        layer_input_image: Image with transparency (RGBA) to take apart; it is scaled to the size of the result by
            `resize_mode`. Every result gets it.
        layer_num: Number of layers, at least 0. A result is a list of `layer_num + 1` RGBA images: the image, and then
            its layers from back to front. With 0, for Qwen-Image-Layered-Control, it is the one layer that the prompt
            describes.
    """

    layer_input_image: Image.Image | None
    layer_num: int | None


@dataclass(frozen=True, eq=False)
class LayerInput:
    """Extension that appends the tokens of the image whose layers are computed.

    Args:
        latents: of the image, scaled.
    """

    latents: Float[Tensor, "1 c h w"]

    def __call__(self, dit: Network, stream: Stream) -> Stream:
        """Return the stream with the image's tokens; see `diffsynth_qwen_image.extension.Extension`."""
        return dit.append_images(stream, (self.latents,), index=LAYER_INPUT)


@unit("layer_input", phase=Phase.ENCODE, only_with="layer_input_image")
def encode_layer_input(
    vae: Any,
    *,
    layer_input_image: Image.Image | None = None,
    height: int,
    width: int,
    resize_mode: ResizeMode,
    tiling: Tiling,
    device: torch.device,
    dtype: torch.dtype,
) -> LayerInput:
    """Return `LayerInput` with the latents of the image, transparency included."""
    assert layer_input_image is not None, "the unit runs only with it"
    pixels = image_to_tensor(layer_input_image, height, width, mode="RGBA", resize_mode=resize_mode)
    return LayerInput(vae.encode(pixels.to(device, dtype), **tiling))


def check(configs: Configs, values: Mapping[str, Any]) -> None:
    """Raise an error for a call whose arguments, network and autoencoder do not fit each other.

    Raises:
        ValueError: a layered network without an image or a number of layers, or with an autoencoder of three channels;
            arguments for layers and another network; an image without transparency.
    """
    dit, vae = configs["dit"], configs["vae"]
    given = {name: values[name] for name in LayerArguments.__annotations__ if values[name] is not None}
    if dit is not None and not dit.layered:
        for name in given:
            raise ValueError(
                f"{name} is given, and the transformer is not Qwen-Image-Layered, which alone computes layers; load "
                f"qwen-image-layered, or leave {name} out"
            )
        if vae is not None and vae.in_channels != 3:
            raise ValueError(
                f"the autoencoder has {vae.in_channels} channels, as that of Qwen-Image-Layered, and the transformer "
                "computes no layers; load the autoencoder of Qwen/Qwen-Image"
            )
    if dit is None or not dit.layered:
        return
    for name, remedy in (
        ("layer_input_image", "pass the image to take apart, of mode RGBA"),
        ("layer_num", "pass the number of layers, or 0 for Qwen-Image-Layered-Control"),
    ):
        if name not in given:
            raise ValueError(f"the transformer is Qwen-Image-Layered, and {name} is not given; {remedy}")
    if vae is not None and vae.in_channels != 4:
        raise ValueError(
            f"the transformer is Qwen-Image-Layered, and the autoencoder has {vae.in_channels} channels; load the one "
            "with four, Qwen/Qwen-Image-Layered:vae/diffusion_pytorch_model.safetensors"
        )
    check_alpha("layer_input_image", values["layer_input_image"])


LAYERS = Feature(
    "layers",
    arguments=LayerArguments,
    units=(encode_layer_input,),
    conditions={"layer_input": Condition("an image has no frames", batch="separate")},
    check=check,
)
