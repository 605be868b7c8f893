"""Reference image of Wan-Fun's Control models: an encoded image as one more frame in front of the video."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, ClassVar

import torch
from jaxtyping import Float
from torch import Tensor

from diffsynth_wan.extension import Sees, Stream

if TYPE_CHECKING:
    from diffsynth_wan.dit import WanDiT
    from diffsynth_wan.windows import Window


@dataclass(frozen=True, eq=False)
class ReferenceFrame:
    """The video looks like this image. The frame stands at time 0, the video follows at 1.

    Args:
        latents: of the image, scaled.
    """

    latents: Float[Tensor, "b c h w"]
    sees: ClassVar[Sees] = "whole"

    def __call__(self, dit: WanDiT, stream: Stream) -> Stream:
        """See `Extension`.

        Raises:
            ValueError: a network without `ref_conv`, or an image of another size than the video.
        """
        if not dit.config.reference_channels:
            raise ValueError(
                "this network takes no reference image (it has no ref_conv); use a Control model V1.1 or 2.2"
            )
        if stream.modulation.shape[1] > 1:
            raise ValueError("a reference image and a time per frame: no published network takes both")
        time, height, width = stream.positions
        reference = dit.ref_conv(self.latents)
        if reference.shape[2:] != (len(height), len(width)):
            raise ValueError(
                f"the reference image gives {tuple(reference.shape[2:])} tokens, a frame of the video has "
                f"{(len(height), len(width))}; resize the image to the size of the video"
            )
        reference = reference.flatten(2).transpose(1, 2).to(stream.tokens.dtype).expand(len(stream.tokens), -1, -1)
        stream = replace(stream, tokens=torch.cat((reference, stream.tokens), dim=1), lead=stream.lead + 1)
        return dit.place(stream, ((0, *(frame + 1 for frame in time)), height, width))

    def in_window(self, window: Window) -> ReferenceFrame:
        """Every window sees it, at time 0."""
        return self
