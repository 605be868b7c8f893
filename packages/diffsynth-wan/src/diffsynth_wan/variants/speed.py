"""Speed control: one number, how much moves, added to the modulation by the time."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, ClassVar

from jaxtyping import Float
from torch import Tensor, nn

from diffsynth.nn import sinusoidal_embedding
from diffsynth_wan.config import WanMotionControllerConfig
from diffsynth_wan.extension import Sees, Stream

if TYPE_CHECKING:
    from diffsynth_wan.dit import WanDiT
    from diffsynth_wan.windows import Window

BUCKET_SCALE = 10.0
"""The net's own unit of motion."""


class WanMotionController(nn.Module):
    """The published `model.safetensors` of Wan2.1-1.3b-speedcontrol."""

    def __init__(self, config: WanMotionControllerConfig) -> None:
        super().__init__()
        self.config = config
        dim = config.dim
        self.linear = nn.Sequential(
            nn.Linear(config.freq_dim, dim), nn.SiLU(), nn.Linear(dim, dim), nn.SiLU(), nn.Linear(dim, 6 * dim)
        )

    def forward(self, motion_bucket_id: Float[Tensor, "b"]) -> Float[Tensor, "b 6 e"]:
        """What is added to the six modulations of every block.

        Args:
            motion_bucket_id: how much moves, from 0 to 100; fp32.
        """
        embedded = sinusoidal_embedding(BUCKET_SCALE * motion_bucket_id.float(), self.config.freq_dim)
        return self.linear(embedded.to(self.linear[0].weight.dtype)).unflatten(-1, (6, -1))


@dataclass(frozen=True, eq=False)
class Speed:
    """Slower or faster motion.

    Args:
        modulation: what the controller gave; it does not depend on the time, so once for all steps.
    """

    modulation: Float[Tensor, "b 6 e"]
    sees: ClassVar[Sees] = "whole"

    def __call__(self, dit: WanDiT, stream: Stream) -> Stream:
        """See `Extension`."""
        return replace(stream, modulation=stream.modulation + self.modulation[:, None].float())

    def in_window(self, window: Window) -> Speed:
        """One number for the whole video."""
        return self
