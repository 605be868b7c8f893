"""ControlNets of Qwen-Image: configs, inferred from the shapes in a file, architectures and published files.

Light: no torch. The networks are in `controlnet` and `blockwise_controlnet`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from diffsynth.core.loader.shapes import Shapes, count_items
from diffsynth.spec import ArchitectureSpec, CheckpointSpec
from diffsynth_qwen_image.checkpoints import HIGH_PRECISION, LORA_TARGETS
from diffsynth_qwen_image.config import QwenImageDiTConfig, infer_blocks, tiny_dit_inputs

if TYPE_CHECKING:
    import torch

CONTROLNET = "qwen_image_controlnet"
BLOCKWISE_CONTROLNET = "qwen_image_blockwise_controlnet"


@dataclass(frozen=True, kw_only=True)
class QwenImageControlNetConfig(QwenImageDiTConfig):
    """Config of a ControlNet that copies the embedders and some blocks of Qwen-Image's transformer; the defaults are
    Qwen-Image-ControlNet-Union.

    Args:
        dim, n_heads, n_layers, in_channels, patch_size, prompt_dim, ffn_dim, frequency_dim, axes_dims, rope_theta,
            norm_eps: see `QwenImageDiTConfig`.
        layered: False; a layered transformer has no ControlNet.
        control_channels: channels of the control latents: those of the latents, and one more with a mask of an image to
            inpaint.

    Raises:
        ValueError: as for `QwenImageDiTConfig`, other control channels, or a layered network.
    """

    n_layers: int = 5
    control_channels: int = 16

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.control_channels not in (self.in_channels, self.in_channels + 1):
            raise ValueError(
                f"control latents of {self.control_channels} channels: expected those of the latents, "
                f"{self.in_channels}, or with a mask {self.in_channels + 1}"
            )
        if self.layered:
            raise ValueError("layered=True: a ControlNet of a layered transformer is not known; expected False")

    @property
    def inpaints(self) -> bool:
        """Whether the control latents are those of an image to inpaint, with a mask as one more channel."""
        return self.control_channels > self.in_channels


@dataclass(frozen=True, kw_only=True)
class BlockwiseControlNetConfig:
    """Config of a block-wise ControlNet of Qwen-Image; the defaults are Qwen-Image-Blockwise-ControlNet-Canny.

    Args:
        dim: width of the transformer's tokens.
        n_layers: number of the transformer's blocks.
        in_channels: channels of the latents.
        patch_size: side of a token in latent pixels.
        additional_in_dim: values of a token beside those of the control latents: 0, or 4 for a mask of an image to
            inpaint.
        norm_eps: epsilon of all norms.

    Raises:
        ValueError: another `additional_in_dim`.
    """

    dim: int = 3072
    n_layers: int = 60
    in_channels: int = 16
    patch_size: int = 2
    additional_in_dim: int = 0
    norm_eps: float = 1e-6

    def __post_init__(self) -> None:
        mask = self.patch_size**2
        if self.additional_in_dim not in (0, mask):
            raise ValueError(f"additional_in_dim={self.additional_in_dim}: expected 0, or {mask} for a mask")

    @property
    def control_channels(self) -> int:
        """Number of channels of the control latents, that of a mask included."""
        return self.in_channels + self.additional_in_dim // self.patch_size**2

    @property
    def inpaints(self) -> bool:
        """Whether the control latents are those of an image to inpaint, with a mask as one more channel."""
        return bool(self.additional_in_dim)


TINY_CONTROLNET = QwenImageControlNetConfig(
    dim=64, n_heads=2, n_layers=1, prompt_dim=48, ffn_dim=256, axes_dims=(4, 14, 14)
)

TINY_BLOCKWISE = BlockwiseControlNetConfig(dim=64, n_layers=2)


def infer_controlnet_config(shapes: Shapes) -> QwenImageControlNetConfig:
    """Return the `QwenImageControlNetConfig` of a ControlNet file, inferred from the shapes of its tensors.

    Raises:
        ValueError: sizes that no network of Qwen-Image has, or control latents of other channels.
    """
    values, pixels = shapes["controlnet_x_embedder.weight"][1], QwenImageControlNetConfig.patch_size**2
    if values % pixels:
        raise ValueError(f"control tokens of {values} values: expected a multiple of the {pixels} pixels of a patch")
    return QwenImageControlNetConfig(**infer_blocks(shapes), control_channels=values // pixels)


def infer_blockwise_config(shapes: Shapes) -> BlockwiseControlNetConfig:
    """Return the `BlockwiseControlNetConfig` of a block-wise ControlNet file, inferred from the shapes of its tensors;
    latents have 16 channels.

    Raises:
        ValueError: control latents of other channels.
    """
    dim, values = shapes["img_in.weight"]
    latents = BlockwiseControlNetConfig.in_channels * BlockwiseControlNetConfig.patch_size**2
    return BlockwiseControlNetConfig(
        dim=dim, n_layers=count_items(shapes, "controlnet_blocks"), additional_in_dim=values - latents
    )


def tiny_controlnet_inputs(config: QwenImageControlNetConfig, generator: torch.Generator) -> dict[str, Any]:
    """Return a dict of arguments of `QwenImageControlNet.forward`: two images of 3 x 5 tokens, with prompts of two
    lengths; fp32 on the CPU.
    """
    import torch

    from diffsynth_qwen_image.extension import Inputs

    inputs = Inputs(**tiny_dit_inputs(config, generator))
    return {"inputs": inputs, "control": torch.randn(2, config.control_channels, 6, 10, generator=generator)}


def tiny_blockwise_inputs(config: BlockwiseControlNetConfig, generator: torch.Generator) -> dict[str, Any]:
    """Return a dict of arguments of `BlockwiseControlNet.forward`: two images of 3 x 5 tokens; fp32 on the CPU."""
    import torch

    return {
        "image": torch.randn(2, 15, config.dim, generator=generator),
        "control": torch.randn(2, config.control_channels, 6, 10, generator=generator),
    }


ARCHITECTURES = (
    ArchitectureSpec(
        name=CONTROLNET,
        module="diffsynth_qwen_image.controlnet:QwenImageControlNet",
        config="diffsynth_qwen_image.controlnet_config:QwenImageControlNetConfig",
        infer_config="diffsynth_qwen_image.controlnet_config:infer_controlnet_config",
        required=(
            "time_text_embed.timestep_embedder.linear_1.weight",
            "txt_norm.weight",
            "img_in.weight",
            "txt_in.weight",
            "controlnet_x_embedder.weight",
            "controlnet_blocks.{n}.weight",
            "transformer_blocks.{n}.img_mod.1.weight",
            "transformer_blocks.{n}.attn.norm_q.weight",
            "transformer_blocks.{n}.attn.add_q_proj.weight",
            "transformer_blocks.{n}.img_mlp.net.2.weight",
        ),
        tiny="diffsynth_qwen_image.controlnet_config:TINY_CONTROLNET",
        tiny_inputs="diffsynth_qwen_image.controlnet_config:tiny_controlnet_inputs",
        high_precision=HIGH_PRECISION,
        repeated_blocks=("transformer_blocks",),
        lora_targets=LORA_TARGETS,
    ),
    ArchitectureSpec(
        name=BLOCKWISE_CONTROLNET,
        module="diffsynth_qwen_image.blockwise_controlnet:BlockwiseControlNet",
        config="diffsynth_qwen_image.controlnet_config:BlockwiseControlNetConfig",
        infer_config="diffsynth_qwen_image.controlnet_config:infer_blockwise_config",
        required=(
            "img_in.weight",
            "controlnet_blocks.{n}.x_rms.weight",
            "controlnet_blocks.{n}.y_rms.weight",
            "controlnet_blocks.{n}.input_proj.weight",
            "controlnet_blocks.{n}.output_proj.weight",
        ),
        tiny="diffsynth_qwen_image.controlnet_config:TINY_BLOCKWISE",
        tiny_inputs="diffsynth_qwen_image.controlnet_config:tiny_blockwise_inputs",
        high_precision=("*_rms.weight",),
        repeated_blocks=("controlnet_blocks",),
        lora_targets=("input_proj", "output_proj"),
    ),
)

_BLOCKWISE = "DiffSynth-Studio/Qwen-Image-Blockwise-ControlNet"

CHECKPOINTS = (
    CheckpointSpec(
        name=CONTROLNET,
        architecture=CONTROLNET,
        files=(
            "InstantX/Qwen-Image-ControlNet-Union:diffusion_pytorch_model.safetensors",
            "InstantX/Qwen-Image-ControlNet-Inpainting:diffusion_pytorch_model.safetensors",
        ),
        file_stem="diffusion_pytorch_model",
    ),
    CheckpointSpec(
        name=BLOCKWISE_CONTROLNET,
        architecture=BLOCKWISE_CONTROLNET,
        signature="073bce9cf969e317e5662cd570c3e79c",
        layout="diffsynth_qwen_image:layouts/blockwise_controlnet.json.gz",
        files=(f"{_BLOCKWISE}-Canny:model.safetensors", f"{_BLOCKWISE}-Depth:model.safetensors"),
    ),
    CheckpointSpec(
        name=f"{BLOCKWISE_CONTROLNET}/inpaint",
        architecture=BLOCKWISE_CONTROLNET,
        signature="a9e54e480a628f0b956a688a81c33bab",
        layout="diffsynth_qwen_image:layouts/blockwise_controlnet_inpaint.json.gz",
        files=(f"{_BLOCKWISE}-Inpaint:model.safetensors",),
    ),
)
