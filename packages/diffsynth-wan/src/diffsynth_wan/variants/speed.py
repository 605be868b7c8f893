"""Speed control: the amount of motion, one number, is added to the modulation of the blocks."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

from jaxtyping import Float
from torch import Tensor, nn

from diffsynth.nn import sinusoidal_embedding
from diffsynth.sampling.windows import Window
from diffsynth_wan.config import WanMotionControllerConfig
from diffsynth_wan.extension import Network, Stream, TokenScope

BUCKET_SCALE = 10.0
"""Factor from `motion_bucket_id` (0 to 100) to the unit that the network was trained with."""


class WanMotionController(nn.Module):
    """Motion controller of Wan2.1-1.3b-speedcontrol; parameter names are those of its `model.safetensors`."""

    def __init__(self, config: WanMotionControllerConfig) -> None:
        super().__init__()
        self.config = config
        dim = config.dim
        self.linear = nn.Sequential(
            nn.Linear(config.freq_dim, dim), nn.SiLU(), nn.Linear(dim, dim), nn.SiLU(), nn.Linear(dim, 6 * dim)
        )

    def forward(self, motion_bucket_id: Float[Tensor, "b"]) -> Float[Tensor, "b 6 e"]:
        """Return a tensor `b 6 e` that is added to the six modulations of every block.

        Args:
            motion_bucket_id: amount of motion, from 0 to 100; fp32.
        """
        embedded = sinusoidal_embedding(BUCKET_SCALE * motion_bucket_id.float(), self.config.freq_dim)
        return self.linear(embedded.to(self.linear[0].weight.dtype)).unflatten(-1, (6, -1))


@dataclass(frozen=True, eq=False)
class SpeedControl:
    """Extension that adds the output of `WanMotionController` to the modulation.

    Args:
        modulation: output of `WanMotionController`; it does not depend on the noise level and serves all steps.
    """

    modulation: Float[Tensor, "b 6 e"]
    token_scope: ClassVar[TokenScope] = "whole"

    def __call__(self, dit: Network, stream: Stream) -> Stream:
        """Return the stream with the modulation added; see `Extension`."""
        return replace(stream, modulation=stream.modulation + self.modulation[:, None].float())

    def in_window(self, window: Window) -> SpeedControl:
        """Return this extension, unchanged: the amount of motion is one for the whole video."""
        return self
