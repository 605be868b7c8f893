"""Camera control of Wan-Fun: the rays of every pixel, embedded, are added to the tokens before the blocks."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, ClassVar

import torch.nn.functional as F
from einops import rearrange
from jaxtyping import Float
from torch import Tensor, nn

from diffsynth_wan.config import CAMERA_PIXELS, WanDiTConfig
from diffsynth_wan.extension import Sees, Stream

if TYPE_CHECKING:
    from diffsynth_wan.dit import WanDiT
    from diffsynth_wan.windows import Window


@dataclass(frozen=True, eq=False)
class CameraMotion:
    """The video is seen by a camera that moves.

    Args:
        rays: Plücker coordinates of the rays through each pixel, 6 per frame, those of the 4 frames of a latent frame
            beside each other: 24 channels at the resolution of the video.
    """

    rays: Float[Tensor, "b 24 t height width"]
    sees: ClassVar[Sees] = "whole"

    def __call__(self, dit: WanDiT, stream: Stream) -> Stream:
        """See `Extension`.

        Raises:
            ValueError: a network without a camera adapter.
        """
        if not dit.config.camera_channels:
            raise ValueError("this network has no camera adapter (control_adapter); use a Control-Camera model")
        return replace(stream, tokens=stream.tokens + dit.control_adapter(self.rays))

    def in_window(self, window: Window) -> CameraMotion:
        """The rays of its frames."""
        return CameraMotion(window.cut(self.rays))


class CameraAdapter(nn.Module):
    """Part of the network of Control-Camera models: rays to tokens, frame by frame."""

    def __init__(self, config: WanDiTConfig) -> None:
        super().__init__()
        patch = config.patch_size[1:]
        channels = config.camera_channels * CAMERA_PIXELS**2
        self.conv = nn.Conv2d(channels, config.dim, kernel_size=patch, stride=patch)
        self.residual_blocks = nn.Sequential(*(CameraBlock(config.dim) for _ in range(config.camera_layers)))

    def forward(self, rays: Float[Tensor, "b c t height width"]) -> Float[Tensor, "b s e"]:
        """One token for each token of the video."""
        frames = rays.shape[2]
        pixels = F.pixel_unshuffle(rearrange(rays, "b c t h w -> (b t) c h w"), CAMERA_PIXELS)
        tokens = self.residual_blocks(self.conv(pixels))
        return rearrange(tokens, "(b t) e h w -> b (t h w) e", t=frames)


class CameraBlock(nn.Module):
    """Two convolutions beside the identity."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(dim, dim, kernel_size=3, padding=1)
        self.conv2 = nn.Conv2d(dim, dim, kernel_size=3, padding=1)

    def forward(self, x: Float[Tensor, "bt e h w"]) -> Float[Tensor, "bt e h w"]:
        """Frame by frame."""
        return x + self.conv2(F.relu(self.conv1(x)))
