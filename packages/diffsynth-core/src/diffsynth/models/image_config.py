"""Configs of the shared image encoders and of networks that make LoRAs of images, inferred from the shapes in a file.

Light: no torch.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from diffsynth.core.loader.shapes import Shapes, count_items

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True, kw_only=True)
class SiglipImageEncoderConfig:
    """Config of the image encoder of SigLIP (arXiv:2303.15343) and SigLIP 2 (arXiv:2502.14786) of one image size; the
    defaults are SigLIP So400m/14 at 384 pixels.

    Args:
        hidden_size: width of the hidden states.
        head_dim: channels of a head: 72 in So400m, 96 in SigLIP 2 giant.
        num_layers: number of layers.
        intermediate_size: inner width of the feed-forward.
        patch_size: side of a patch in pixels.
        image_size: side of the square that images are resized to, in pixels; a rest after whole patches is not read.
        pooling_head: whether the network has a head that pools the states of all patches to one vector.

    Raises:
        ValueError: the width is no multiple of the head dimension.
    """

    hidden_size: int = 1152
    head_dim: int = 72
    num_layers: int = 27
    intermediate_size: int = 4304
    patch_size: int = 14
    image_size: int = 384
    pooling_head: bool = True

    def __post_init__(self) -> None:
        if self.hidden_size % self.head_dim:
            raise ValueError(
                f"hidden_size={self.hidden_size}: expected a multiple of the head dimension {self.head_dim}"
            )

    @property
    def num_patches(self) -> int:
        """Number of patches of an image."""
        return (self.image_size // self.patch_size) ** 2


TINY_SIGLIP = SiglipImageEncoderConfig(hidden_size=144, num_layers=2, intermediate_size=80, image_size=42)


def tiny_siglip_inputs(config: SiglipImageEncoderConfig, generator: torch.Generator) -> dict[str, Any]:
    """Return a dict of the arguments of `SiglipImageEncoder.forward`: two random images, fp32 on the CPU, for the
    hidden states; the bits of the pooled vector depend on where the weights of torch's attention lie in memory.
    """
    import torch

    side = config.image_size
    return {"image": torch.rand(2, 3, side, side, generator=generator) * 2 - 1}


def infer_siglip_config(shapes: Shapes) -> SiglipImageEncoderConfig:
    """Return the `SiglipImageEncoderConfig` of the network in a file, from `shapes` (tensor name -> shape).

    Raises:
        ValueError: the width is a multiple of neither head dimension.
    """
    hidden_size, _, patch_size, _ = shapes["vision_model.embeddings.patch_embedding.weight"]
    side = round(shapes["vision_model.embeddings.position_embedding.weight"][0] ** 0.5)
    return SiglipImageEncoderConfig(
        hidden_size=hidden_size,
        # The networks of 1152 and of 1536 channels have 16 heads each.
        head_dim=96 if hidden_size % 72 and not hidden_size % 96 else 72,
        num_layers=count_items(shapes, "vision_model.encoder.layers"),
        intermediate_size=shapes["vision_model.encoder.layers.0.mlp.fc1.weight"][0],
        patch_size=patch_size,
        # Of 384 pixels, 27 patches of 14 cover 378.
        image_size=384 if (side, patch_size) == (27, 14) else side * patch_size,
        pooling_head="vision_model.head.probe" in shapes,
    )


@dataclass(frozen=True, kw_only=True)
class Dinov3ImageEncoderConfig:
    """Config of the image encoder of DINOv3 (arXiv:2508.10104) with gated feed-forwards; the defaults are DINOv3-7B.

    Args:
        hidden_size: width of the hidden states, a multiple of `head_dim`.
        head_dim: channels of a head, a multiple of 4.
        num_layers: number of layers.
        intermediate_size: inner width of the gated feed-forward.
        num_register_tokens: number of tokens between the class token and the patches.
        patch_size: side of a patch in pixels.
        image_size: side of the square that images are resized to, in pixels.
        rope_theta: base of the rotary frequencies.
        norm_eps: epsilon of all norms.

    Raises:
        ValueError: the width is no multiple of the head dimension.
    """

    hidden_size: int = 4096
    head_dim: int = 128
    num_layers: int = 40
    intermediate_size: int = 8192
    num_register_tokens: int = 4
    patch_size: int = 16
    image_size: int = 224
    rope_theta: float = 100.0
    norm_eps: float = 1e-5

    def __post_init__(self) -> None:
        if self.hidden_size % self.head_dim:
            raise ValueError(
                f"hidden_size={self.hidden_size}: expected a multiple of the head dimension {self.head_dim}"
            )


TINY_DINOV3 = Dinov3ImageEncoderConfig(hidden_size=256, num_layers=2, intermediate_size=80)


def tiny_dinov3_inputs(config: Dinov3ImageEncoderConfig, generator: torch.Generator) -> dict[str, Any]:
    """Return a dict of the argument of `Dinov3ImageEncoder.forward`: two random images of 2 x 3 patches, fp32 on the
    CPU.
    """
    import torch

    size = (2 * config.patch_size, 3 * config.patch_size)
    return {"image": torch.randn(2, 3, *size, generator=generator)}


def infer_dinov3_config(shapes: Shapes) -> Dinov3ImageEncoderConfig:
    """Return the `Dinov3ImageEncoderConfig` of the network in a file, from `shapes` (tensor name -> shape).

    Raises:
        ValueError: queries have a bias, as in the smaller networks of DINOv3, or the width is no multiple of the head
            dimension.
    """
    if "layer.0.attention.q_proj.bias" in shapes:
        raise ValueError("its queries have a bias, which those of DINOv3-7B do not have")
    hidden_size, _, patch_size, _ = shapes["embeddings.patch_embeddings.weight"]
    return Dinov3ImageEncoderConfig(
        hidden_size=hidden_size,
        num_layers=count_items(shapes, "layer"),
        intermediate_size=shapes["layer.0.mlp.gate_proj.weight"][0],
        num_register_tokens=shapes["embeddings.register_tokens"][1],
        patch_size=patch_size,
    )


LoRATarget = tuple[str, int, int]
"""A linear layer that a LoRA changes: its name in its block, its inputs and its outputs."""


@dataclass(frozen=True, kw_only=True)
class ImageToLoRAConfig:
    """Config of a network that makes a LoRA of another network from an image; see `diffsynth.models.image_to_lora`.

    Args:
        stacks: (name of the networks for one list of blocks, "" without a name; the list's name in the network that
            the LoRA changes, "layers"; its number of blocks) for each list.
        groups: the linear layers of a block that the LoRA changes, in groups; each group has a list of its own.
        image_dim: width of an image's embedding.
        compress_dim: inner width of the network of a matrix.
        rank: of the LoRA of one image.
        residual_length: tokens of the vision-language model's hidden states; 0 for a network without a residual.
        residual_dim: width of these hidden states.
        residual_mid_dim: inner width of their projection, for each token.
    """

    stacks: tuple[tuple[str, str, int], ...]
    groups: tuple[tuple[LoRATarget, ...], ...]
    image_dim: int = 5632
    compress_dim: int = 128
    rank: int = 4
    residual_length: int = 0
    residual_dim: int = 3584
    residual_mid_dim: int = 1024

    def __post_init__(self) -> None:
        # Metadata is JSON: it gives lists where a hashable config needs tuples.
        object.__setattr__(self, "stacks", tuple(tuple(stack) for stack in self.stacks))
        object.__setattr__(self, "groups", tuple(tuple(tuple(one) for one in group) for group in self.groups))


def tiny_image_to_lora_inputs(config: ImageToLoRAConfig, generator: torch.Generator) -> dict[str, Any]:
    """Return a dict of the arguments of `ImageToLoRA.forward`: random hidden states of one image, fp32 on the CPU."""
    import torch

    image = torch.randn(config.image_dim, generator=generator)
    if not config.residual_length:
        return {"image": image}
    return {"image": image, "residual": torch.randn(config.residual_length, config.residual_dim, generator=generator)}


def infer_image_to_lora_config(
    shapes: Shapes, *, stacks: Mapping[str, str], groups: Sequence[Sequence[str]], rank: int = 4
) -> ImageToLoRAConfig:
    """Return the `ImageToLoRAConfig` of the network in a file, from `shapes` (tensor name -> shape).

    Args:
        shapes: of the file.
        stacks: name of the networks for one list of blocks, "" without a name -> the list's name in the network that
            the LoRA changes.
        groups: names of the linear layers of each group.
        rank: of the LoRA of one image, which shapes do not tell from the layers' sizes.

    Raises:
        ValueError: a number of blocks that is no multiple of the number of groups, other layers in a group, or sizes
            that are no multiple of the rank.
    """
    counts = {}
    for name in stacks:
        blocks = count_items(shapes, f"{name}.blocks".lstrip("."))
        if blocks % len(groups) or not blocks:
            raise ValueError(f"{name or 'it'} has {blocks} blocks; expected a multiple of {len(groups)}")
        counts[name] = blocks // len(groups)
    first, count = next(iter(counts.items()))
    prefix = f"{first}.blocks".lstrip(".")
    found = []
    for index, names in enumerate(groups):
        layers = f"{prefix}.{index * count}.layers"
        if count_items(shapes, layers) != len(names):
            raise ValueError(f"{layers} has {count_items(shapes, layers)} networks; expected {len(names)}")
        sizes = [[shapes[f"{layers}.{n}.proj_{ab}.proj_out.weight"][0] for ab in "ab"] for n in range(len(names))]
        if any(size % rank for pair in sizes for size in pair):
            raise ValueError(f"{layers}: sizes {sizes}; expected multiples of the rank {rank}")
        found.append(tuple((name, a // rank, b // rank) for name, (a, b) in zip(names, sizes, strict=True)))
    compress_dim, image_dim = shapes[f"{prefix}.0.layers.0.proj_a.proj_in.weight"]
    residual = {}
    if f"{prefix}.0.proj_residual.proj_in.weight" in shapes:
        middle, width = shapes[f"{prefix}.0.proj_residual.proj_in.weight"]
        length = shapes[f"{prefix}.0.proj_residual.proj_out.weight"][1] // middle
        residual = {"residual_length": length, "residual_dim": width, "residual_mid_dim": middle}
    return ImageToLoRAConfig(
        stacks=tuple((name, stacks[name], counts[name]) for name in stacks),
        groups=tuple(found),
        image_dim=image_dim,
        compress_dim=compress_dim,
        rank=rank,
        **residual,
    )
