"""Camera control of Wan-Fun: embedded camera rays of every pixel are added to the tokens before the blocks."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

from jaxtyping import Float
from torch import Tensor

from diffsynth_wan.extension import Network, Stream, TokenScope
from diffsynth_wan.windows import Window


@dataclass(frozen=True, eq=False)
class CameraMotion:
    """Extension that conditions the video on a camera path.

    Args:
        rays: Plücker coordinates of the ray through each pixel, 6 per frame. Those of the 4 frames of a latent frame
            are stacked along the channels: 24 channels at the resolution of the video.
    """

    rays: Float[Tensor, "b 24 t height width"]
    token_scope: ClassVar[TokenScope] = "whole"

    def __call__(self, dit: Network, stream: Stream) -> Stream:
        """Return the stream with the embedded rays added to its tokens; see `Extension`.

        Raises:
            ValueError: the network has no camera adapter.
        """
        if not dit.config.camera_channels:
            raise ValueError("this network has no camera adapter (control_adapter); use a Control-Camera model")
        return replace(stream, tokens=stream.tokens + dit.control_adapter(self.rays))

    def in_window(self, window: Window) -> CameraMotion:
        """Return a `CameraMotion` with the camera rays of the frames of `window`."""
        return CameraMotion(window.cut(self.rays))
