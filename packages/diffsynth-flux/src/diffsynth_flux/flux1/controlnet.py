"""ControlNets of FLUX.1 (Zhang et al. 2023, arXiv:2302.05543), by InstantX, Shakker Labs, alimama and Jasper AI.

A shorter copy of the transformer takes the noised latents and those of a control image. Each of its blocks gives a
hint, which is added to the image's tokens after several consecutive blocks of the transformer. A Union ControlNet has a
learned token for each kind of control image, before those of the text.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from diffsynth.core.gradient import gradient_checkpoint_forward
from diffsynth.models.residuals import ScaledHint, hint_of
from diffsynth_flux.flux1.config import FluxControlNetConfig
from diffsynth_flux.flux1.dit import add_blocks, add_embedders, embed_inputs, grid_positions, patchify, rotary_embedding
from diffsynth_flux.flux1.extension import Inputs, Network, StackName, Stream

Hints = dict[StackName, tuple[Float[Tensor, "b i e"], ...]]
"""Stack of blocks -> the hints for it, in order."""


@dataclass(frozen=True, eq=False)
class ControlNetResiduals:
    """Extension that adds the hints of a ControlNet to the image's tokens. Those of several ControlNets add up.

    Args:
        controlnet: ControlNet of this transformer.
        control: control latents, with a mask if the ControlNet inpaints; scaled as the transformer's latents, of their
            height and width and of their batch or a batch of 1.
        scale: factor of the hints; 0 runs no ControlNet.
        mode: kind of the control image, for a ControlNet of several kinds; else None.
    """

    controlnet: FluxControlNet
    control: Float[Tensor, "#b c h w"]
    scale: float = 1.0
    mode: int | None = None

    def __call__(self, dit: Network, stream: Stream) -> Stream:
        """Return the stream with the hints as residuals; see `diffsynth_flux.flux1.extension.Extension`.

        Raises:
            ValueError: the ControlNet does not fit the transformer, or the control latents do not fit the ControlNet or
                the latents.
        """
        if self.scale == 0:
            return stream
        theirs, ours = dit.config.dim, self.controlnet.config.dim
        if theirs != ours:
            raise ValueError(
                f"the ControlNet has tokens of width {ours}, the transformer of {theirs}; load a ControlNet of this "
                "transformer"
            )
        hints = self.controlnet(stream.inputs, self.control, self.mode)
        # Tokens that another extension appended get no hint.
        appended = stream.image.shape[1] - stream.inputs.patches.shape[1]
        for stack, each in hints.items():
            blocks = len(getattr(dit, stack))
            residuals = [ScaledHint(F.pad(hint, (0, 0, 0, appended)), self.scale) for hint in each]
            for block in range(blocks) if each else ():
                stream = stream.with_residual(stack, block, residuals[hint_of(block, blocks, len(each))])
        return stream


class FluxControlNet(nn.Module):
    """ControlNet of FLUX.1. Parameter names are those of the transformer, `FluxDiT`, and of diffusers for what only a
    ControlNet has.

    `gradient_checkpointing` is a plain attribute, as in `FluxDiT`.
    """

    def __init__(self, config: FluxControlNetConfig) -> None:
        super().__init__()
        self.config = config
        self.gradient_checkpointing = False
        add_embedders(self, config)
        self.controlnet_x_embedder = nn.Linear(config.control_channels, config.dim)
        self.controlnet_mode_embedder = nn.Embedding(config.num_modes, config.dim) if config.num_modes else None
        add_blocks(self, config)
        self.controlnet_blocks = nn.ModuleList(nn.Linear(config.dim, config.dim) for _ in self.double_blocks)
        self.controlnet_single_blocks = nn.ModuleList(nn.Linear(config.dim, config.dim) for _ in self.single_blocks)

    def forward(self, inputs: Inputs, control: Float[Tensor, "#b c h w"], mode: int | None = None) -> Hints:
        """Return a dict stack -> hints, tensors `b i e` that are to be added to the tokens of the image.

        Args:
            inputs: arguments of the transformer.
            control: control latents, see `ControlNetResiduals`.
            mode: kind of the control image, from 0 to `config.num_modes - 1`; None for a ControlNet of one kind.

        Raises:
            ValueError: control latents whose channels, size or batch do not fit, or a mode that is missing, not taken
                or out of range.
        """
        self._check(inputs, control, mode)
        image, text, modulation = embed_inputs(self, self.config, inputs)
        dtype = image.dtype
        image = image + self.controlnet_x_embedder(patchify(control.to(dtype))).to(dtype)
        if self.controlnet_mode_embedder is not None:
            token = self.controlnet_mode_embedder(torch.tensor([[mode]], device=image.device)).to(dtype)
            text = torch.cat((token.expand(len(text), -1, -1), text), dim=1)
        length = text.shape[1]
        rows, columns = (side // 2 for side in control.shape[2:])
        positions = torch.cat((torch.zeros(length, 3, dtype=torch.long), grid_positions(rows, columns)))[None]
        shared = (modulation, rotary_embedding(positions, self.config, image.device))
        hints: dict[StackName, list[Tensor]] = {"double_blocks": [], "single_blocks": []}
        for block, project in zip(self.double_blocks, self.controlnet_blocks, strict=True):
            image, text = gradient_checkpoint_forward(block, self.gradient_checkpointing, False, image, text, *shared)
            hints["double_blocks"].append(project(image))
        tokens = torch.cat((text, image), dim=1)
        for block, project in zip(self.single_blocks, self.controlnet_single_blocks, strict=True):
            tokens = gradient_checkpoint_forward(block, self.gradient_checkpointing, False, tokens, *shared)
            hints["single_blocks"].append(project(tokens[:, length:]))
        return {stack: tuple(each) for stack, each in hints.items()}

    def _check(self, inputs: Inputs, control: Tensor, mode: int | None) -> None:
        config = self.config
        channels = config.control_channels // 4
        if control.ndim != 4 or control.shape[1] != channels:
            parts = f"{config.latent_channels} of control latents" + (" and 1 of a mask" if config.inpaints else "")
            raise ValueError(
                f"the control latents have the shape {tuple(control.shape)}; this ControlNet takes b c h w with "
                f"{channels} channels: {parts}"
            )
        batch, tokens = inputs.patches.shape[:2]
        if control.shape[2] * control.shape[3] // 4 != tokens or control.shape[0] not in (1, batch):
            raise ValueError(
                f"the control latents have {control.shape[2]}x{control.shape[3]} latent pixels and a batch of "
                f"{control.shape[0]}, the image {tokens} tokens and a batch of {batch}; encode a control image of the "
                "size of the result"
            )
        if (mode is None) != (not config.num_modes) or (mode is not None and mode not in range(config.num_modes)):
            expected = f"an integer from 0 to {config.num_modes - 1}" if config.num_modes else "None"
            raise ValueError(f"mode={mode!r}: this ControlNet takes {expected}")
