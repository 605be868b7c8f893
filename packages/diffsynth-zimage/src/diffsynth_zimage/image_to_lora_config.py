"""Config of Z-Image's image-to-LoRA network, inferred from the shapes in its file. Light: no torch."""

from __future__ import annotations

from diffsynth.core.loader.shapes import Shapes
from diffsynth.models.image_config import ImageToLoRAConfig, infer_image_to_lora_config

STACKS = {
    "layers_lora": "layers",
    "context_refiner_lora": "context_refiner",
    "noise_refiner_lora": "noise_refiner",
}
"""Name of the networks for a list of blocks of Z-Image's transformer -> name of the list."""

GROUPS = (
    ("attention.to_q", "attention.to_k", "attention.to_v", "attention.to_out.0"),
    ("feed_forward.w1", "feed_forward.w2", "feed_forward.w3"),
)
"""The linear layers of a block that the LoRA changes."""

STYLE = ImageToLoRAConfig(
    stacks=(
        ("layers_lora", "layers", 30),
        ("context_refiner_lora", "context_refiner", 2),
        ("noise_refiner_lora", "noise_refiner", 2),
    ),
    groups=(
        tuple((name, 3840, 3840) for name in GROUPS[0]),
        (("feed_forward.w1", 3840, 10240), ("feed_forward.w2", 10240, 3840), ("feed_forward.w3", 3840, 10240)),
    ),
)
"""Config of the published Z-Image-i2L."""

TINY_STYLE = ImageToLoRAConfig(
    stacks=(
        ("layers_lora", "layers", 2),
        ("context_refiner_lora", "context_refiner", 1),
        ("noise_refiner_lora", "noise_refiner", 1),
    ),
    groups=(
        tuple((name, 64, 64) for name in GROUPS[0]),
        (("feed_forward.w1", 64, 170), ("feed_forward.w2", 170, 64), ("feed_forward.w3", 64, 170)),
    ),
    image_dim=400,
    compress_dim=8,
)


def infer_style_config(shapes: Shapes) -> ImageToLoRAConfig:
    """Return the `ImageToLoRAConfig` of the network in a file, from `shapes` (tensor name -> shape).

    Raises:
        ValueError: other lists, groups or sizes than those of the published network.
    """
    return infer_image_to_lora_config(shapes, stacks=STACKS, groups=GROUPS)
