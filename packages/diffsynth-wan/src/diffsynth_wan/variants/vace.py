"""VACE: a second, shorter stack of blocks over control latents adds hints to the network (arXiv:2503.07598)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from diffsynth.core.gradient import gradient_checkpoint_forward
from diffsynth.models.residuals import ScaledHint
from diffsynth_wan.config import WanVaceConfig
from diffsynth_wan.dit import WanBlock
from diffsynth_wan.extension import Attend, Network, Rotary, Stream, TokenScope


@dataclass(frozen=True, eq=False)
class VaceControl:
    """Extension that adds the hints of a `WanVace` network after evenly spaced blocks.

    Args:
        vace: VACE network.
        control_latents: control video, mask and reference images; see `WanVace.forward`.
        scale: factor of the hints; 0 gives the output of the network without VACE.
    """

    vace: WanVace
    control_latents: Float[Tensor, "b c t h w"]
    scale: float = 1.0
    token_scope: ClassVar[TokenScope] = "part"

    def __call__(self, dit: Network, stream: Stream) -> Stream:
        """Return the stream with the hints as residuals; see `Extension`.

        Raises:
            ValueError: the number of hints does not divide the number of blocks of `dit`.
        """
        hints = self.vace(stream, self.control_latents, hinted_blocks(len(dit.blocks), len(self.vace.vace_blocks)))
        for block, hint in hints.items():
            stream = stream.with_residual(block, ScaledHint(hint, self.scale))
        return stream


def hinted_blocks(blocks: int, hints: int) -> range:
    """Return a range of the indices of the blocks that get a hint (a tensor added to the tokens): every `blocks //
    hints`-th, from 0; raise ValueError unless `hints` divides `blocks`.

    Raises:
        ValueError: `hints` does not divide `blocks`.
    """
    if blocks % hints:
        raise ValueError(
            f"{hints} blocks of VACE do not divide the {blocks} blocks of the network; load the VACE of this network"
        )
    return range(0, blocks, blocks // hints)


class WanVace(nn.Module):
    """VACE network. Parameter names are the `vace_*` names of files that hold it together with the transformer.

    `gradient_checkpointing` is a plain attribute, as in `WanDiT`.
    """

    def __init__(self, config: WanVaceConfig) -> None:
        super().__init__()
        self.config = config
        self.gradient_checkpointing = False
        self.vace_patch_embedding = nn.Conv3d(
            config.in_channels, config.dim, kernel_size=config.patch_size, stride=config.patch_size
        )
        self.vace_blocks = nn.ModuleList(VaceBlock(config, first=index == 0) for index in range(config.num_layers))

    def forward(
        self, stream: Stream, control_latents: Float[Tensor, "b c t h w"], hinted: Sequence[int]
    ) -> dict[int, Float[Tensor, "b s e"]]:
        """Return a dict index of a block in `hinted` -> hint, a tensor `b s e` that is to be added to the tokens after
        that block.

        Args:
            stream: inputs of the network's blocks.
            control_latents: latents of the kept and of the masked parts of the control video, and the mask, stacked
                along the channels; reference images are frames before the video. Missing frames at the end are zero.
            hinted: index of a block of the network for each VACE block.

        Raises:
            ValueError: the control latents have more tokens than the stream.
        """
        control = self.vace_patch_embedding(control_latents).flatten(2).transpose(1, 2)
        frames, height, width = stream.grid
        missing = frames * height * width - control.shape[1]
        if missing < 0:
            raise ValueError(f"control_latents give {control.shape[1]} tokens, the video has {frames * height * width}")
        control = stream.split(F.pad(control, (0, 0, 0, missing)).to(stream.tokens.dtype))
        hints = {}
        for index, block in zip(hinted, self.vace_blocks, strict=True):
            control, hints[index] = gradient_checkpoint_forward(
                block,
                self.gradient_checkpointing,
                False,
                control,
                stream.tokens,
                stream.context,
                stream.modulation,
                stream.rotary,
                stream.attend(index),
            )
        return hints


class VaceBlock(WanBlock):
    """A block over control tokens and the projection of its output to a hint; the first block adds the video tokens."""

    def __init__(self, config: WanVaceConfig, *, first: bool) -> None:
        super().__init__(config, image_branch=False)
        self.before_proj = nn.Linear(config.dim, config.dim) if first else None
        self.after_proj = nn.Linear(config.dim, config.dim)

    def forward(  # type: ignore[override]
        self,
        control: Float[Tensor, "b s e"],
        tokens: Float[Tensor, "b s e"],
        context: Float[Tensor, "b l e"],
        modulation: Float[Tensor, "b g 6 e"],
        rotary: Rotary,
        attend: Attend,
    ) -> tuple[Float[Tensor, "b s e"], Float[Tensor, "b s e"]]:
        """Return (control tokens after this block, hint to add to the network's tokens), two tensors `b s e`."""
        if self.before_proj is not None:
            control = tokens + self.before_proj(control)
        control = super().forward(control, context, None, modulation, rotary, attend)
        return control, self.after_proj(control)
