"""Speed control: the amount of motion, one number, is added to the modulation of the blocks."""

from __future__ import annotations

from typing import Any, TypedDict

import torch

from diffsynth.runtime.feature import Condition, Feature, in_window
from diffsynth.runtime.role import Agreement, Role
from diffsynth.runtime.unit import unit
from diffsynth_wan.units.shape import VideoShape
from diffsynth_wan.variants.speed import SpeedControl


class SpeedArguments(TypedDict, total=False):
    """Amount of motion.

    Args:
        motion_bucket_id: Amount of motion in [0, 100], for the speed control model; None disables speed control.
    """

    motion_bucket_id: float | None


@unit("speed_control", only_with="motion_bucket_id")
def encode_speed(
    motion_controller: Any, *, motion_bucket_id: float | None = None, video_shape: VideoShape
) -> SpeedControl:
    """Return a `SpeedControl` for the call's amount of motion."""
    assert motion_bucket_id is not None, "the unit runs only with it"
    bucket = torch.tensor([float(motion_bucket_id)], device=video_shape.device)
    return SpeedControl(motion_controller(bucket))


SPEED = Feature(
    "speed",
    arguments=SpeedArguments,
    roles={"motion_controller": Role(architectures=("wan_motion_controller",), optional=True)},
    agreements=(Agreement("width of the tokens", ("dit.dim", "motion_controller.dim")),),
    units=(encode_speed,),
    conditions={"speed_control": Condition(in_window, batch="separate")},
)
