"""Reference image of Wan-Fun's Control models: an encoded image as one more frame before the video."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from jaxtyping import Float
from torch import Tensor

from diffsynth_wan.extension import Network, Stream, TokenScope
from diffsynth_wan.windows import Window


@dataclass(frozen=True, eq=False)
class ReferenceFrame:
    """Extension that prepends a reference image at time 0; the video follows from time 1.

    Args:
        latents: scaled latents of the image.
    """

    latents: Float[Tensor, "b c h w"]
    token_scope: ClassVar[TokenScope] = "whole"

    def __call__(self, dit: Network, stream: Stream) -> Stream:
        """Return the stream with the frame prepended; see `Extension`.

        Raises:
            ValueError: the network has no `ref_conv`, or the image has another size than the video.
        """
        if not dit.config.reference_channels:
            raise ValueError(
                "this network takes no reference image (it has no ref_conv); use a Control model V1.1 or 2.2"
            )
        if stream.modulation.shape[1] > 1:
            raise ValueError("a reference image together with one time per frame: no published network takes both")
        time, height, width = stream.positions
        reference = dit.ref_conv(self.latents)
        if reference.shape[2:] != (len(height), len(width)):
            raise ValueError(
                f"the reference image has {tuple(reference.shape[2:])} tokens, a frame of the video "
                f"{(len(height), len(width))}; resize the image to the size of the video"
            )
        reference = reference.flatten(2).transpose(1, 2).to(stream.tokens.dtype).expand(len(stream.tokens), -1, -1)
        tokens = torch.cat((reference, stream.tokens), dim=1)
        stream = replace(stream, tokens=tokens, prefix_frames=stream.prefix_frames + 1)
        return dit.set_positions(stream, ((0, *(frame + 1 for frame in time)), height, width))

    def in_window(self, window: Window) -> ReferenceFrame:
        """Return this extension, unchanged: every window gets the reference frame, at time 0."""
        return self
