"""Qwen-Image's image-to-LoRA networks (Qwen-Image-i2L): configs, inferred from the shapes in a file, and files.

Light: no torch. The networks are in `diffsynth.models.image_to_lora`.
"""

from __future__ import annotations

from dataclasses import replace

from diffsynth.core.loader.shapes import Shapes
from diffsynth.models.image_config import ImageToLoRAConfig, infer_image_to_lora_config
from diffsynth.spec import ArchitectureSpec, CheckpointSpec

STACKS = {"": "transformer_blocks"}
"""Name of the networks, which are at the top of the file -> the list of blocks of Qwen-Image's transformer."""

GROUPS = (
    ("attn.to_q", "attn.to_k", "attn.to_v", "attn.to_out.0"),
    ("img_mlp.net.2", "img_mod.1"),
    ("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj", "attn.to_add_out"),
    ("txt_mlp.net.2", "txt_mod.1"),
)
"""The linear layers of a block that the LoRA changes."""

RESIDUAL_SIDES = {"coarse": 224, "fine": 1024}
"""Kind of network -> side of the square, in pixels, at which the text encoder gets an image."""

RESIDUAL_LENGTHS = {"style": 0, "coarse": 8 * 8 + 7, "fine": 37 * 37 + 7}
"""Kind of network -> number of hidden states of the text encoder that it reads beside the image encoders' outputs: one
for each token of 28 x 28 pixels of the image, and 7 of the template."""


def _config(dim: int, *, num_blocks: int, compress_dim: int, **fields: int) -> ImageToLoRAConfig:
    attention = [tuple((name, dim, dim) for name in GROUPS[index]) for index in (0, 2)]
    others = [((GROUPS[index][0], 4 * dim, dim), (GROUPS[index][1], dim, 6 * dim)) for index in (1, 3)]
    groups = (attention[0], others[0], attention[1], others[1])
    stacks = (("", "transformer_blocks", num_blocks),)
    return ImageToLoRAConfig(stacks=stacks, groups=groups, compress_dim=compress_dim, **fields)


STYLE = _config(3072, num_blocks=60, compress_dim=64)
"""Config of the published Qwen-Image-i2L-Style."""

COARSE = replace(STYLE, compress_dim=128, residual_length=RESIDUAL_LENGTHS["coarse"])
"""Config of the published Qwen-Image-i2L-Coarse."""

FINE = replace(COARSE, residual_length=RESIDUAL_LENGTHS["fine"], residual_mid_dim=64)
"""Config of the published Qwen-Image-i2L-Fine."""

TINY_STYLE = _config(16, num_blocks=1, compress_dim=4, image_dim=400)
TINY_COARSE = replace(TINY_STYLE, residual_length=RESIDUAL_LENGTHS["coarse"], residual_dim=8, residual_mid_dim=3)
TINY_FINE = replace(TINY_COARSE, residual_length=RESIDUAL_LENGTHS["fine"])


def infer_style_config(shapes: Shapes) -> ImageToLoRAConfig:
    """Return the `ImageToLoRAConfig` of a network for the style of images, from `shapes` (tensor name -> shape).

    Raises:
        ValueError: another network, such as one with a residual.
    """
    return _infer(shapes, "style")


def infer_coarse_config(shapes: Shapes) -> ImageToLoRAConfig:
    """Return the `ImageToLoRAConfig` of a network for the content of images, from `shapes` (tensor name -> shape).

    Raises:
        ValueError: another network, such as one without a residual.
    """
    return _infer(shapes, "coarse")


def infer_fine_config(shapes: Shapes) -> ImageToLoRAConfig:
    """Return the `ImageToLoRAConfig` of a network for details of images, from `shapes` (tensor name -> shape).

    Raises:
        ValueError: another network, such as one without a residual.
    """
    return _infer(shapes, "fine")


def _infer(shapes: Shapes, kind: str) -> ImageToLoRAConfig:
    config = infer_image_to_lora_config(shapes, stacks=STACKS, groups=GROUPS)
    if config.residual_length != RESIDUAL_LENGTHS[kind]:
        raise ValueError(f"its residual has {config.residual_length} tokens; expected {RESIDUAL_LENGTHS[kind]}")
    return config


def architecture_name(kind: str) -> str:
    """Return the name of the architecture for "style", "coarse" or "fine"."""
    return f"qwen_image_image_to_lora_{kind}"


ARCHITECTURES = tuple(
    ArchitectureSpec(
        name=architecture_name(kind),
        module=f"diffsynth_qwen_image.image_to_lora:{kind.title()}ToLoRA",
        config="diffsynth.models.image_config:ImageToLoRAConfig",
        infer_config=f"diffsynth_qwen_image.image_to_lora_config:infer_{kind}_config",
        required=tuple(
            f"blocks.{{n}}.layers.0.proj_{matrix}.proj_{end}.weight" for matrix in ("a", "b") for end in ("in", "out")
        ),
        tiny=f"diffsynth_qwen_image.image_to_lora_config:TINY_{kind.upper()}",
        tiny_inputs="diffsynth.models.image_config:tiny_image_to_lora_inputs",
        repeated_blocks=("blocks",),
    )
    for kind in RESIDUAL_LENGTHS
)

_SIGNATURES = {
    "style": "0aad514690602ecaff932c701cb4b0bb",
    "coarse": "a166c33455cdbd89c0888a3645ca5c0f",
    "fine": "a5476e691767a4da6d3a6634a10f7408",
}

CHECKPOINTS = tuple(
    CheckpointSpec(
        name=architecture_name(kind),
        architecture=architecture_name(kind),
        signature=signature,
        layout=f"diffsynth_qwen_image:layouts/image_to_lora_{kind}.json.gz",
        files=(f"DiffSynth-Studio/Qwen-Image-i2L:Qwen-Image-i2L-{kind.title()}.safetensors",),
    )
    for kind, signature in _SIGNATURES.items()
)
