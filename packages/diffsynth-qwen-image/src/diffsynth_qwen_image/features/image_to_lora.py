"""LoRAs of images: as an argument of a call, and as a pipeline that returns the LoRA (Qwen-Image-i2L).

Three networks make them: that for the style reads the embeddings of the image encoders, and those for the content,
coarse and fine, also the text encoder's hidden states of the image. The LoRA is the sum of those that are loaded.
"""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from diffsynth.core.data.color import to_rgb
from diffsynth.core.data.image import cover
from diffsynth.errors import MissingComponent
from diffsynth.runtime.feature import Configs
from diffsynth.runtime.image_to_lora import (
    STYLE,
    Changes,
    ImageToLoRAPipeline,
    check_networks,
    embed_images,
    image_to_lora_feature,
    image_to_lora_roles,
    style_changes,
)
from diffsynth.runtime.images import Images, image_list
from diffsynth.runtime.role import Agreement, Role, Tokenizer
from diffsynth.runtime.unit import Phase, unit
from diffsynth_qwen_image.features.edit import PROCESSOR, as_prompt_images
from diffsynth_qwen_image.image_to_lora_config import RESIDUAL_LENGTHS, RESIDUAL_SIDES, architecture_name
from diffsynth_qwen_image.units import encode_prompt

COARSE, FINE = "image2lora_coarse", "image2lora_fine"
"""Roles of the networks that also read the text encoder's hidden states."""

NETWORKS = {STYLE: architecture_name("style"), COARSE: architecture_name("coarse"), FINE: architecture_name("fine")}
"""Role -> architecture of the network."""

AGREEMENTS = (
    Agreement(
        "width of the text encoder",
        ("text_encoder.hidden_size", f"{COARSE}.residual_dim", f"{FINE}.residual_dim"),
    ),
)


@unit("image2lora_coarse_residual", phase=Phase.TEXT, only_with="image2lora_images", requires=(COARSE,))
def encode_coarse(
    text_encoder: Any,
    tokenizer: Any,
    processor: Any,
    *,
    image2lora_images: Images = None,
    device: torch.device,
    dtype: torch.dtype,
) -> Float[Tensor, "n s e"]:
    """Return a tensor `n s e`: the text encoder's hidden states of each image, seen at 224 x 224 pixels."""
    return _residuals((text_encoder, tokenizer, processor), image2lora_images, "coarse", device=device, dtype=dtype)


@unit("image2lora_fine_residual", phase=Phase.TEXT, only_with="image2lora_images", requires=(FINE,))
def encode_fine(
    text_encoder: Any,
    tokenizer: Any,
    processor: Any,
    *,
    image2lora_images: Images = None,
    device: torch.device,
    dtype: torch.dtype,
) -> Float[Tensor, "n s e"]:
    """Return a tensor `n s e`: the text encoder's hidden states of each image, seen at 1024 x 1024 pixels."""
    return _residuals((text_encoder, tokenizer, processor), image2lora_images, "fine", device=device, dtype=dtype)


@unit("image2lora_changes", only_with="image2lora_images")
def coarse_changes(
    image2lora_coarse: Any,
    *,
    image2lora_images: Images = None,
    image2lora_x: Float[Tensor, "n e"],
    image2lora_coarse_residual: Float[Tensor, "n s e"],
    image2lora_changes: Changes,
) -> Changes:
    """Return the changes so far, and those of the coarse network."""
    pairs = zip(image2lora_x, image2lora_coarse_residual, strict=True)
    return (*image2lora_changes, *(image2lora_coarse(*pair) for pair in pairs))


@unit("image2lora_changes", only_with="image2lora_images")
def fine_changes(
    image2lora_fine: Any,
    *,
    image2lora_images: Images = None,
    image2lora_x: Float[Tensor, "n e"],
    image2lora_fine_residual: Float[Tensor, "n s e"],
    image2lora_changes: Changes,
) -> Changes:
    """Return the changes so far, and those of the fine network."""
    pairs = zip(image2lora_x, image2lora_fine_residual, strict=True)
    return (*image2lora_changes, *(image2lora_fine(*pair) for pair in pairs))


def check_components(configs: Configs) -> None:
    """Raise an error unless all networks that make a LoRA are there, and fit each other.

    Args:
        configs: role -> config of its component, None for one that is not loaded.

    Raises:
        MissingComponent: what the loaded networks read is not loaded, or none is.
        InvalidPipeline: a network takes another width than the encoders have together.
    """
    check_networks(configs)
    missing = [role for role in ("text_encoder", "tokenizer", "processor") if configs[role] is None]
    readers = [role for role in (COARSE, FINE) if configs[role] is not None]
    if missing and readers:
        raise MissingComponent(
            f"image2lora_images needs {' and '.join(missing)}, through which the images also reach "
            f"{' and '.join(readers)}; add the text encoder of Qwen/Qwen-Image to model_configs, and "
            f"{PROCESSOR.source} as processor_config, or load {STYLE} alone"
        )


UNITS = (encode_coarse, encode_fine, style_changes, coarse_changes, fine_changes)

IMAGE_TO_LORA = image_to_lora_feature(
    NETWORKS,
    units=UNITS,
    roles={"processor": PROCESSOR},
    agreements=AGREEMENTS,
    check_components=check_components,
)


class QwenImageImageToLoRAPipeline(ImageToLoRAPipeline):
    """Makes a LoRA for Qwen-Image from images (Qwen-Image-i2L)."""

    roles = {
        "text_encoder": Role(architectures=("qwen2.5_vl_text_encoder",), optional=True),
        **image_to_lora_roles(NETWORKS, optional=False),
        "tokenizer": Tokenizer(source="Qwen/Qwen-Image:tokenizer/"),
        "processor": PROCESSOR,
    }
    units = (embed_images, *UNITS)
    agreements = AGREEMENTS

    def check_components(self, configs: Configs) -> None:
        """Raise an error unless the networks of the call are loaded and fit each other.

        Raises:
            MissingComponent, InvalidPipeline: as for the feature.
        """
        check_components(configs)


def _residuals(
    parts: tuple[Any, Any, Any], images: Images, kind: str, *, device: torch.device, dtype: torch.dtype
) -> Float[Tensor, "n s e"]:
    """Return a tensor `n s e` of the hidden states of images, each as in a prompt for editing without text.

    Args:
        parts: text encoder, tokenizer and image processor.
        images: of the call.
        kind: of the network, "coarse" or "fine".
        device, dtype: of the result.

    Raises:
        ValueError: another number of tokens than the network is trained with.
    """
    text_encoder, tokenizer, processor = parts
    length, side = RESIDUAL_LENGTHS[kind], RESIDUAL_SIDES[kind]
    found = []
    for image in image_list(images):
        prompt_images = as_prompt_images(processor, [cover(to_rgb(image), side, side)], ("",))
        states, _ = encode_prompt(
            text_encoder, tokenizer, prompt="", prompt_images=prompt_images, device=device, dtype=dtype
        )
        if states.shape[1] != length and device.type != "meta":  # a plan counts a fixed number of tokens of a text
            raise ValueError(
                f"an image of {side}x{side} pixels has {states.shape[1]} tokens with this tokenizer and processor, and "
                f"the {kind} network is trained with {length}; load those of Qwen/Qwen-Image-Edit"
            )
        found.append(states[0, -length:])
    return torch.stack(found)
