"""Video to video: the loop begins with a noised input video."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, TypedDict

from jaxtyping import Float
from torch import Tensor

from diffsynth.runtime.feature import Configs, Feature
from diffsynth.runtime.unit import Phase, unit
from diffsynth_wan.units.clips import Clip, check_call_clip
from diffsynth_wan.units.shape import VideoShape


class VideoArguments(TypedDict, total=False):
    """Input video.

    Args:
        input_video: Video to start from: at least `num_frames` frames, or a tensor `1 3 t h w` in [-1, 1]; None starts
            from pure noise. `denoising_strength` sets how much of it is kept.
    """

    input_video: Clip | None


@unit("input_latents", phase=Phase.ENCODE, only_with="input_video")
def encode_input_video(
    vae: Any, *, input_video: Clip | None = None, video_shape: VideoShape
) -> Float[Tensor, "1 c t h w"]:
    """Return the latents `1 c t h w` of the first frames of the input video, as many as the call's video has."""
    assert input_video is not None, "the unit runs only with it"
    return video_shape.encode_clip(vae, "input_video", input_video)


def check(configs: Configs, values: Mapping[str, Any]) -> None:
    """Raise ValueError for an input video that is too short or of another size."""
    check_call_clip("input_video", configs, values)


VIDEO = Feature("video", arguments=VideoArguments, units=(encode_input_video,), check=check)
