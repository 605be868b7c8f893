"""Inputs of ControlNets: `ControlNetInput`, one condition image of a call, and what families do with them alike."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from PIL import Image
from torch import Tensor

from diffsynth.core.arguments import check_integer, check_number
from diffsynth.core.data.image import ResizeMode
from diffsynth.models.tiles import Tiling
from diffsynth.runtime.feature import StepContext
from diffsynth.runtime.images import image_to_tensor, mask_to_tensor


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
        ValueError: an id that is no integer of at least 0, a scale that is no finite number, or not
            `0 <= end <= start <= 1`.
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
        check_integer("controlnet_id", self.controlnet_id, least=0)
        check_number("scale", self.scale)
        for name in ("start", "end"):
            check_number(name, getattr(self, name), least=0, most=1)
        if self.end > self.start:
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


ControlNetInputs = ControlNetInput | Sequence[ControlNetInput] | None
"""The type of an argument for one condition image or several."""


@dataclass(frozen=True, eq=False)
class ControlNetContext:
    """One encoded condition image of a call.

    Args:
        latents: what the ControlNet takes, such as control latents with a mask.
        settings: the ControlNet, scale, start and end.
        mode: kind of the image, for a ControlNet of several kinds; else None.
    """

    latents: Float[Tensor, "1 c h w"]
    settings: ControlNetInput
    mode: int | None = None


@dataclass(frozen=True, eq=False)
class ControlNetContexts:
    """The encoded condition images of a call. A family's extension of its transformer is a subclass."""

    contexts: tuple[ControlNetContext, ...]

    def active(self, step: StepContext) -> list[ControlNetContext]:
        """Return a list of those whose ControlNet runs in a step: between `start` and `end`, and `scale` is not 0."""
        return [
            each
            for each in self.contexts
            if each.settings.scale != 0 and each.settings.is_active(step.index, step.num_steps)
        ]


def active_roles(role: str, contexts: ControlNetContexts | None, step: StepContext) -> tuple[str, ...]:
    """Return a tuple of the roles of the ControlNets that run in a step, such as `("controlnet[0]",)`.

    Args:
        role: the role that holds the ControlNets.
        contexts: of the call; None if it uses no ControlNet.
        step: the step.
    """
    active = [] if contexts is None else contexts.active(step)
    return tuple(dict.fromkeys(f"{role}[{each.settings.controlnet_id}]" for each in active))


def listed(inputs: ControlNetInputs) -> list[ControlNetInput]:
    """Return the inputs of a call as a list; empty for None."""
    if inputs is None:
        return []
    return list(inputs) if isinstance(inputs, list | tuple) else [inputs]  # type: ignore[list-item]


def config_for(each: ControlNetInput, networks: Sequence[Any], *, argument: str) -> Any:
    """Return the config of the ControlNet that an input names.

    Args:
        each: the input.
        networks: configs of the loaded ControlNets.
        argument: name of the call's argument, for the message.

    Raises:
        ValueError: no such ControlNet is loaded.
    """
    if each.controlnet_id >= len(networks):
        raise ValueError(
            f"{argument}: controlnet_id={each.controlnet_id}, and {len(networks)} are loaded; expected 0 to "
            f"{len(networks) - 1}, in the order of model_configs"
        )
    return networks[each.controlnet_id]


def check_image(each: ControlNetInput, *, argument: str) -> None:
    """Raise ValueError unless an input has one image, as `image` or as `inpaint_image`.

    Args:
        each: the input.
        argument: name of the call's argument, for the message.
    """
    if (each.image is None) == (each.inpaint_image is None):
        raise ValueError(f"{argument}: an input needs one of image and inpaint_image")


def check_mask(each: ControlNetInput, *, inpaints: bool, argument: str) -> None:
    """Raise ValueError unless an input has a mask if its ControlNet takes one, and none otherwise.

    Args:
        each: the input.
        inpaints: whether the ControlNet takes a mask.
        argument: name of the call's argument, for the message.
    """
    if inpaints != (each.inpaint_mask is not None):
        needs = "needs inpaint_mask, and none is given" if inpaints else "takes a control image without a mask"
        raise ValueError(f"{argument}: ControlNet {each.controlnet_id} {needs}")


def encode_control_image(
    vae: Any,
    each: ControlNetInput,
    *,
    height: int,
    width: int,
    resize_mode: ResizeMode = "stretch",
    tiling: Tiling,
    device: torch.device,
    dtype: torch.dtype,
) -> Float[Tensor, "1 c h w"]:
    """Return the latents of an input's image, a tensor `1 c h w`; with a mask, those of the image with the masked part
    in black, and one more channel that is 1 where the image is kept.

    Args:
        vae: the autoencoder.
        each: the input, with one of `image` and `inpaint_image`.
        height, width: of the result, in pixels.
        resize_mode: how an image and a mask of another aspect ratio are scaled to it.
        tiling: arguments of `vae.encode`.
        device, dtype: of the pixels and latents.
    """
    image = each.image if each.inpaint_image is None else each.inpaint_image
    assert image is not None, "checked before anything was encoded"
    pixels = image_to_tensor(image, height, width, resize_mode=resize_mode)
    if each.inpaint_mask is None:
        return vae.encode(pixels.to(device, dtype), **tiling)
    changes = mask_to_tensor(each.inpaint_mask, height, width, resize_mode=resize_mode)
    latents = vae.encode((pixels * (1 - changes) - changes).to(device, dtype), **tiling)
    kept = F.interpolate(1 - changes, size=latents.shape[2:], mode="nearest").to(latents)
    return torch.cat((latents, kept), dim=1)
