"""VACE: a second, shorter stream over control latents, whose blocks add hints to the first (arXiv:2503.07598)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from diffsynth.core.gradient import gradient_checkpoint_forward
from diffsynth_wan.config import WanVaceConfig
from diffsynth_wan.dit import WanBlock
from diffsynth_wan.extension import Attend, Rotary, Sees, Stream

if TYPE_CHECKING:
    from diffsynth_wan.dit import WanDiT


@dataclass(frozen=True, eq=False)
class VaceControl:
    """The video follows a control video, keeps what a mask leaves, and looks like reference images.

    Args:
        vace: its network.
        control_latents: see `WanVace.forward`.
        scale: factor on the hints; 0 gives what the network gives without them.
    """

    vace: WanVace
    control_latents: Float[Tensor, "b c t h w"]
    scale: float = 1.0
    sees: ClassVar[Sees] = "part"

    def __call__(self, dit: WanDiT, stream: Stream) -> Stream:
        """See `Extension`.

        Raises:
            ValueError: the hints do not spread evenly over the blocks of `dit`.
        """
        hints = self.vace(stream, self.control_latents, hinted_blocks(len(dit.blocks), len(self.vace.vace_blocks)))
        for block, hint in hints.items():
            stream = stream.with_residual(block, _Hint(hint, self.scale))
        return stream


@dataclass(frozen=True, eq=False)
class _Hint:
    hint: Tensor
    scale: float

    def __call__(self, tokens: Tensor) -> Tensor:
        return self.hint * self.scale


def hinted_blocks(blocks: int, hints: int) -> range:
    """The blocks of the network that get a hint: every second of 30, every fifth of 40.

    Raises:
        ValueError: `hints` does not divide `blocks`.
    """
    if blocks % hints:
        raise ValueError(
            f"{hints} blocks of VACE do not spread evenly over {blocks} blocks; they are of another network"
        )
    return range(0, blocks, blocks // hints)


class WanVace(nn.Module):
    """The `vace_*` parameters that VACE files hold beside those of the network.

    `gradient_checkpointing` is a plain switch, as in `WanDiT`.
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
        self, stream: Stream, control_latents: Float[Tensor, "b c t h w"], beside: Sequence[int]
    ) -> dict[int, Float[Tensor, "b s e"]]:
        """A hint for each of these blocks of the network.

        Args:
            stream: as it is about to enter the blocks.
            control_latents: what the control video keeps and what it leaves open, encoded, and its mask; reference
                images are frames in front. Where it has fewer frames than the stream, the rest is zero.
            beside: one block of the network for each of ours.

        Raises:
            ValueError: more control than the stream has tokens.
        """
        control = self.vace_patch_embedding(control_latents).flatten(2).transpose(1, 2)
        frames, height, width = stream.grid
        missing = frames * height * width - control.shape[1]
        if missing < 0:
            raise ValueError(f"control_latents give {control.shape[1]} tokens, the video has {frames * height * width}")
        control = stream.split(F.pad(control, (0, 0, 0, missing)).to(stream.tokens.dtype))
        hints = {}
        for index, block in zip(beside, self.vace_blocks, strict=True):
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
    """A block of the second stream, and the projection of its hint; the first block joins control and tokens."""

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
        """The second stream after this block, and the hint."""
        if self.before_proj is not None:
            control = tokens + self.before_proj(control)
        control = super().forward(control, context, None, modulation, rotary, attend)
        return control, self.after_proj(control)
