"""Control video and reference image of Wan-Fun's Control models."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar, TypedDict

import torch
from jaxtyping import Float
from PIL import Image
from torch import Tensor

from diffsynth.runtime.feature import Condition, Configs, Feature, in_window
from diffsynth.runtime.unit import Phase, unit
from diffsynth.sampling.windows import Window
from diffsynth_wan.extension import Network, Stream, TokenScope
from diffsynth_wan.units.clips import Clip, check_call_clip
from diffsynth_wan.units.shape import VideoShape


class ControlArguments(TypedDict, total=False):
    """Control video and reference image.

    Args:
        control_video: Video of poses, depth or edges with at least `num_frames` frames, for Fun-Control models.
        reference_image: Image whose look the video takes over, for Fun-Control models V1.1 and 2.2.
    """

    control_video: Clip | None
    reference_image: Image.Image | None


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


@unit("control_latents", phase=Phase.ENCODE, only_with="control_video")
def encode_control_video(
    vae: Any, *, control_video: Clip | None = None, video_shape: VideoShape
) -> Float[Tensor, "1 c t h w"]:
    """Return the latents `1 c t h w` of the first frames of the control video, as many as the call's video has."""
    assert control_video is not None, "the unit runs only with it"
    return video_shape.encode_clip(vae, "control_video", control_video)


@unit("reference_frame", phase=Phase.ENCODE, only_with="reference_image")
def encode_reference_image(
    vae: Any, *, reference_image: Image.Image | None = None, video_shape: VideoShape
) -> ReferenceFrame:
    """Return a `ReferenceFrame` with the latents of the reference image."""
    assert reference_image is not None, "the unit runs only with it"
    return ReferenceFrame(video_shape.encode_image(vae, reference_image)[:, :, 0])


def check(configs: Configs, values: Mapping[str, Any]) -> None:
    """Raise an error for a control video or a reference image that does not fit the video or the network.

    Raises:
        ValueError: a control video is too short or of another size, missing, or not taken; a reference image is not
            taken.
    """
    check_call_clip("control_video", configs, values)
    config = configs["dit"]
    if config is None:
        return
    takes_control = config.in_channels - config.out_channels >= 2 * config.out_channels
    if values["control_video"] is None and takes_control:
        raise ValueError("this network needs a control video; pass control_video")
    if values["control_video"] is not None and not takes_control:
        raise ValueError("control_video is given, but this network takes none; load a Fun-Control model")
    if values["reference_image"] is not None and not config.reference_channels:
        raise ValueError("reference_image is given, but this network takes none; load a Control model V1.1 or 2.2")


CONTROL = Feature(
    "control",
    arguments=ControlArguments,
    units=(encode_control_video, encode_reference_image),
    conditions={"reference_frame": Condition(in_window, batch="separate")},
    check=check,
)
