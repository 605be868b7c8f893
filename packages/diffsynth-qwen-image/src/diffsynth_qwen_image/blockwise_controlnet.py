"""Block-wise ControlNets of Qwen-Image by DiffSynth-Studio: Canny, Depth and Inpaint.

A block-wise ControlNet has a small MLP for each block of the transformer. It takes the tokens of the image after the
block and those of the control image, and what it returns is added to the tokens of the image.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from diffsynth.core.gradient import gradient_checkpoint_forward
from diffsynth.nn import RMSNorm
from diffsynth_qwen_image.controlnet import check_control, check_width
from diffsynth_qwen_image.controlnet_config import BlockwiseControlNetConfig
from diffsynth_qwen_image.dit import patchify
from diffsynth_qwen_image.extension import Network, Stream


@dataclass(frozen=True, eq=False)
class Control:
    """A block-wise ControlNet and what it gets.

    Args:
        network: block-wise ControlNet of this transformer.
        latents: control latents, with a mask if the ControlNet inpaints; scaled as the transformer's latents, of their
            height and width and of their batch or a batch of 1.
        scale: factor of what is added; 0 runs no ControlNet.
    """

    network: BlockwiseControlNet
    latents: Float[Tensor, "#b c h w"]
    scale: float = 1.0


@dataclass(frozen=True, eq=False)
class BlockwiseResiduals:
    """Extension that adds the hints of block-wise ControlNets. All get the tokens after the block, without the hints
    of each other.
    """

    controls: Sequence[Control]

    def __call__(self, dit: Network, stream: Stream) -> Stream:
        """Return the stream with a residual for each block; see `diffsynth_qwen_image.extension.Extension`.

        Raises:
            ValueError: a ControlNet does not fit the transformer, or its control latents do not fit it or the latents.
        """
        active = [each for each in self.controls if each.scale != 0]
        if not active:
            return stream
        blocks = len(dit.transformer_blocks)
        for config in (each.network.config for each in active):
            check_width(config.dim, dit)
            if config.n_layers != blocks:
                raise ValueError(
                    f"the ControlNet has {config.n_layers} blocks, the transformer {blocks}; load a ControlNet of this "
                    "transformer"
                )
        for each in active:
            check_control(each.latents, each.network.config.control_channels, stream.inputs.latents)
        parts = [(each, each.network.embed(each.latents.to(stream.image.dtype))) for each in active]
        for index in range(blocks):
            stream = stream.with_residual(
                "transformer_blocks", index, _BlockResidual(index, parts, stream.num_computed_tokens)
            )
        return stream


@dataclass(frozen=True, eq=False)
class _BlockResidual:
    """Residual of a block: the scaled hints of several ControlNets, of the first `count` tokens."""

    index: int
    parts: Sequence[tuple[Control, Float[Tensor, "#b i e"]]]
    count: int

    def __call__(self, image: Float[Tensor, "b i e"]) -> Float[Tensor, "b i e"]:
        tokens = image[:, : self.count]
        hints = [each.network.hint(self.index, tokens, control) * each.scale for each, control in self.parts]
        # Tokens that another extension appended get no hint.
        return F.pad(sum(hints[1:], start=hints[0]), (0, 0, 0, image.shape[1] - self.count))


class BlockwiseControlNet(nn.Module):
    """Block-wise ControlNet of Qwen-Image. Parameter names are those of the published files.

    `gradient_checkpointing` is a plain attribute: if True, blocks recompute their activations in the backward pass.
    """

    def __init__(self, config: BlockwiseControlNetConfig) -> None:
        super().__init__()
        self.config = config
        self.gradient_checkpointing = False
        self.img_in = nn.Linear(config.control_channels * config.patch_size**2, config.dim)
        self.controlnet_blocks = nn.ModuleList(BlockwiseControlBlock(config) for _ in range(config.n_layers))

    def forward(
        self, image: Float[Tensor, "b i e"], control: Float[Tensor, "#b c h w"]
    ) -> tuple[Float[Tensor, "b i e"], ...]:
        """Return a tuple of the hint for each block, tensors `b i e`, for the same tokens after every block.

        The transformer's tokens change from block to block, so an extension calls `embed` once and then `hint` for each
        block.

        Args:
            image: tokens of the image.
            control: control latents.
        """
        tokens = self.embed(control)
        return tuple(self.hint(index, image, tokens) for index in range(self.config.n_layers))

    def embed(self, control: Float[Tensor, "#b c h w"]) -> Float[Tensor, "#b i e"]:
        """Return the tokens `b i e` of control latents."""
        return self.img_in(patchify(control, self.config.patch_size)).to(control.dtype)

    def hint(
        self, index: int, image: Float[Tensor, "b i e"], control: Float[Tensor, "#b i e"]
    ) -> Float[Tensor, "b i e"]:
        """Return what is added to the tokens of the image after a block, a tensor `b i e`.

        Args:
            index: of the block.
            image: tokens of the image after it.
            control: tokens of the control latents, see `embed`.
        """
        block = self.controlnet_blocks[index]
        return gradient_checkpoint_forward(block, self.gradient_checkpointing, False, image, control)


class BlockwiseControlBlock(nn.Module):
    """MLP of the normed tokens of image and control image together."""

    def __init__(self, config: BlockwiseControlNetConfig) -> None:
        super().__init__()
        self.x_rms = RMSNorm(config.dim, eps=config.norm_eps)
        self.y_rms = RMSNorm(config.dim, eps=config.norm_eps)
        self.input_proj = nn.Linear(config.dim, config.dim)
        self.output_proj = nn.Linear(config.dim, config.dim)

    def forward(self, image: Float[Tensor, "b i e"], control: Float[Tensor, "#b i e"]) -> Float[Tensor, "b i e"]:
        """Return the hint, a tensor `b i e`, from the tokens of the image and those of the control image."""
        hidden = self.input_proj(self.x_rms(image) + self.y_rms(control))
        return self.output_proj(F.gelu(hidden))
