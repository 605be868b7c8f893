"""`ControlNetInput`: one condition image of a call, and the steps during which it is active."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from PIL import Image


@dataclass
class ControlNetInput:
    """One condition image for one of a pipeline's ControlNets.

    Args:
        controlnet_id: index of the ControlNet, in the order in which they were loaded.
        scale: factor on the residuals of the ControlNet.
        start: progress at which it becomes active, in [0, 1]; progress is 1 at the first step and 0 at the last.
        end: progress at which it ends, in [0, 1].
        image: the condition image.
        inpaint_image: the image to inpaint.
        inpaint_mask: the region to inpaint, in white.
        processor_id: kind of condition, for a ControlNet that is trained for several.

    Raises:
        ValueError: a negative id, or not `0 <= end <= start <= 1`.
    """

    controlnet_id: int = 0
    scale: float = 1.0
    start: float = 1.0
    end: float = 0.0
    image: Image.Image | None = None
    inpaint_image: Image.Image | None = None
    inpaint_mask: Image.Image | None = None
    processor_id: Any = None

    def __post_init__(self) -> None:
        if self.controlnet_id < 0:
            raise ValueError(f"controlnet_id={self.controlnet_id}: expected 0 or more")
        if not 0 <= self.end <= self.start <= 1:
            raise ValueError(
                f"start={self.start}, end={self.end}: progress falls from 1 to 0, so expected 0 <= end <= start <= 1"
            )

    def is_active(self, step: int, num_steps: int) -> bool:
        """Whether the ControlNet is active in a step (from 0): its progress, 1 at the first and 0 at the last (or only)
        step, is in [`end`, `start`].

        Raises:
            ValueError: a step outside of 0 to `num_steps - 1`.
        """
        if not 0 <= step < num_steps:
            raise ValueError(f"step {step} of {num_steps}: expected 0 to {num_steps - 1}")
        progress = (num_steps - 1 - step) / max(num_steps - 1, 1)
        return self.end <= progress <= self.start
