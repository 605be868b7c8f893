"""ControlNets of Qwen-Image that copy the first blocks of its transformer (Zhang et al. 2023, arXiv:2302.05543), by
InstantX: Union and Inpainting.

The copy takes the noised latents and those of a control image. Each of its blocks gives a hint, which is added to the
image's tokens after several consecutive blocks of the transformer. The kind of the control image is not an input.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from diffsynth.models.residuals import ScaledHint, hint_of
from diffsynth_qwen_image.controlnet_config import QwenImageControlNetConfig
from diffsynth_qwen_image.dit import QwenImageBlocks, patchify
from diffsynth_qwen_image.extension import Inputs, Network, Stream


@dataclass(frozen=True, eq=False)
class ControlNetResiduals:
    """Extension that adds the hints of a ControlNet to the tokens of the image. Those of several ControlNets add up.

    Args:
        controlnet: ControlNet of this transformer.
        control: control latents, with a mask if the ControlNet inpaints; scaled as the transformer's latents, of their
            height and width and of their batch or a batch of 1.
        scale: factor of the hints; 0 runs no ControlNet.
        inputs: the arguments of the ControlNet; None is those of the transformer.
    """

    controlnet: QwenImageControlNet
    control: Float[Tensor, "#b c h w"]
    scale: float = 1.0
    inputs: Inputs | None = None

    def __call__(self, dit: Network, stream: Stream) -> Stream:
        """Return the stream with the hints as residuals; see `diffsynth_qwen_image.extension.Extension`.

        Raises:
            ValueError: the ControlNet does not fit the transformer, or the control latents do not fit the ControlNet or
                the latents.
        """
        if self.scale == 0:
            return stream
        check_width(self.controlnet.config.dim, dit)
        hints = self.controlnet(self.inputs or stream.inputs, self.control, step=stream.step)
        # Tokens that another extension appended get no hint.
        appended = stream.image.shape[1] - stream.num_computed_tokens
        residuals = [ScaledHint(F.pad(hint, (0, 0, 0, appended)), self.scale) for hint in hints]
        blocks = len(dit.transformer_blocks)
        for block in range(blocks):
            stream = stream.with_residual("transformer_blocks", block, residuals[hint_of(block, blocks, len(hints))])
        return stream


class QwenImageControlNet(QwenImageBlocks):
    """ControlNet of Qwen-Image. Parameter names are those of the transformer, `QwenImageDiT`, and of diffusers for what
    only a ControlNet has.
    """

    config: QwenImageControlNetConfig

    def __init__(self, config: QwenImageControlNetConfig) -> None:
        super().__init__(config)
        self.controlnet_x_embedder = nn.Linear(config.control_channels * config.patch_size**2, config.dim)
        self.controlnet_blocks = nn.ModuleList(nn.Linear(config.dim, config.dim) for _ in self.transformer_blocks)

    def forward(
        self, inputs: Inputs, control: Float[Tensor, "#b c h w"], *, step: Any = None
    ) -> tuple[Float[Tensor, "b i e"], ...]:
        """Return a tuple of the hints, tensors `b i e` that are to be added to the tokens of the image.

        Args:
            inputs: arguments of the transformer, for one image.
            control: control latents, see `ControlNetResiduals`.
            step: context of the sampling step, which keeps the RoPE tables of the call; None computes them.

        Raises:
            ValueError: control latents whose channels, size or batch do not fit.
        """
        check_control(control, self.config.control_channels, inputs.latents)
        stream = self.embed(inputs.latents, inputs.sigma, inputs.prompt_embeds, inputs.prompt_mask, step=step)
        image, text, mask = stream.image, stream.text, stream.mask()
        dtype = image.dtype
        image = image + self.controlnet_x_embedder(patchify(control.to(dtype), self.config.patch_size)).to(dtype)
        hints = []
        for index, project in enumerate(self.controlnet_blocks):
            image, text = self.run_block(index, image, text, stream, mask)
            hints.append(project(image))
        return tuple(hints)


def check_width(dim: int, dit: Network) -> None:
    """Raise ValueError unless the tokens of a ControlNet are as wide as those of the transformer.

    Args:
        dim: width of the ControlNet's tokens.
        dit: the transformer.
    """
    if dim != dit.config.dim:
        raise ValueError(
            f"the ControlNet has tokens of width {dim}, the transformer of {dit.config.dim}; load a ControlNet of this "
            "transformer"
        )


def check_control(control: Tensor, channels: int, latents: Tensor) -> None:
    """Raise ValueError unless control latents fit a ControlNet and the latents.

    Args:
        control: the control latents.
        channels: that the ControlNet takes.
        latents: of the image, `b c h w`.
    """
    if latents.ndim != 4:
        raise ValueError(f"the latents have the shape {tuple(latents.shape)}; a ControlNet takes those of one image")
    if control.ndim != 4 or control.shape[1] != channels:
        parts = f"{latents.shape[1]} of control latents" + (" and 1 of a mask" if channels > latents.shape[1] else "")
        raise ValueError(
            f"the control latents have the shape {tuple(control.shape)}; this ControlNet takes b c h w with {channels} "
            f"channels: {parts}"
        )
    if control.shape[2:] != latents.shape[2:] or control.shape[0] not in (1, len(latents)):
        raise ValueError(
            f"the control latents have {control.shape[2]}x{control.shape[3]} latent pixels and a batch of "
            f"{control.shape[0]}, the latents {latents.shape[2]}x{latents.shape[3]} and a batch of {len(latents)}; "
            "encode a control image of the size of the result"
        )
