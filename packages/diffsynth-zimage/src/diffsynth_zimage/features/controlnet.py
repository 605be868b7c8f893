"""ControlNets of Z-Image (Fun-Controlnet-Union and -Tile): one or more, each with scale, start and end.

The network is in `diffsynth_zimage.controlnet`. Its config says what it takes beside the control latents, such as a
mask and the latents of an image to inpaint.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, TypedDict

import torch
import torch.nn.functional as F
from torch import Tensor

from diffsynth.core.data.image import ResizeMode
from diffsynth.models.tiles import Tiling
from diffsynth.runtime.controlnet import (
    ControlNetContext,
    ControlNetContexts,
    ControlNetInputs,
    active_roles,
    config_for,
    listed,
)
from diffsynth.runtime.feature import Condition, Configs, Feature, StepContext
from diffsynth.runtime.images import image_to_tensor, mask_to_tensor
from diffsynth.runtime.role import Agreement, Role
from diffsynth.runtime.unit import Phase, unit
from diffsynth_zimage.controlnet import ControlNetResiduals
from diffsynth_zimage.extension import Network, Stream

ROLE = "controlnet"


class ControlNetArguments(TypedDict, total=False):
    """Inputs of ControlNets.

    Args:
        controlnet_inputs: Condition image, or image to inpaint with a mask that is white where it changes, with scale,
            start and end; or a list of them, for several ControlNets or several images. None uses no ControlNet.
    """

    controlnet_inputs: ControlNetInputs


class ControlNets(ControlNetContexts):
    """Extension that adds the hints of the ControlNets that are active in the step."""

    def __call__(self, dit: Network, stream: Stream) -> Stream:
        """Return the stream with the hints as residuals; see `diffsynth_zimage.extension.Extension`."""
        assert stream.step is not None, "the pipeline sets it"
        for each in self.active(stream.step):
            network = stream.step.networks[ROLE][each.settings.controlnet_id]
            stream = ControlNetResiduals(network, each.latents, each.settings.scale)(dit, stream)
        return stream


@unit(
    "controlnets",
    phase=Phase.ENCODE,
    requires=(ROLE,),
    only_with="controlnet_inputs",
)
def encode_controlnet_inputs(
    vae: Any,
    *,
    controlnet_inputs: ControlNetInputs = None,
    controlnet_channels: tuple[int, ...],
    height: int,
    width: int,
    resize_mode: ResizeMode,
    tiling: Tiling,
    device: torch.device,
    dtype: torch.dtype,
) -> ControlNets:
    """Return `ControlNets` with the encoded condition images of the call.

    A ControlNet that inpaints takes the control latents, a mask that is 1 where the image is kept, and the latents of
    the image without the changing part. Without an image to inpaint these are 0, as in diffusers; so are the control
    latents without a condition image.
    """

    def encode(pixels: Tensor) -> Tensor:
        return vae.encode(pixels.to(device, dtype), **tiling)

    contexts = []
    for each in listed(controlnet_inputs):
        parts = []
        if each.image is not None:
            parts.append(encode(image_to_tensor(each.image, height, width, resize_mode=resize_mode)))
        if each.inpaint_image is not None:
            assert each.inpaint_mask is not None, "checked before anything was encoded"
            changes = mask_to_tensor(each.inpaint_mask, height, width, resize_mode=resize_mode)
            pixels = image_to_tensor(each.inpaint_image, height, width, resize_mode=resize_mode)
            latents = encode(pixels * (1 - changes))
            kept = F.interpolate(1 - changes, size=latents.shape[2:], mode="nearest").to(latents)
            parts = parts or [torch.zeros_like(latents)]
            parts += [kept, latents]
        context = torch.cat(parts, dim=1)
        missing = controlnet_channels[each.controlnet_id] - context.shape[1]
        contexts.append(ControlNetContext(F.pad(context, (0, 0, 0, 0, 0, missing)), each))
    return ControlNets(tuple(contexts))


def check(configs: Configs, values: Mapping[str, Any]) -> None:
    """Raise an error for condition images that no loaded ControlNet takes.

    Raises:
        ValueError: an index of no ControlNet, an input without an image, a mask without an image to inpaint or the
            reverse, or an image to inpaint for a ControlNet that takes none.
    """
    networks = configs[ROLE]
    for each in listed(values["controlnet_inputs"]):
        if each.image is None and each.inpaint_image is None:
            raise ValueError("controlnet_inputs: an input has neither image nor inpaint_image; pass one of them")
        if (each.inpaint_image is None) != (each.inpaint_mask is None):
            raise ValueError("controlnet_inputs: only one of inpaint_image and inpaint_mask is given; pass both")
        if networks is None:
            continue
        config = config_for(each, networks, argument="controlnet_inputs")
        if each.inpaint_image is not None and not config.inpaints:
            raise ValueError(
                f"controlnet_inputs: inpaint_image is given, and ControlNet {each.controlnet_id} takes a condition "
                "image only; load Union 2.0 or 2.1"
            )


def roles_at(step: StepContext, values: Mapping[str, Any]) -> tuple[str, ...]:
    """Return a tuple of the roles of the ControlNets that run in a step."""
    return active_roles(ROLE, values.get("controlnets"), step)


CONTROLNET = Feature(
    "controlnet",
    arguments=ControlNetArguments,
    roles={ROLE: Role(architectures=("z_image_controlnet",), optional=True, many=True)},
    loop_roles=(ROLE,),
    facts={"controlnet_channels": f"{ROLE}.in_channels"},
    agreements=(
        Agreement("width of the tokens", ("dit.dim", f"{ROLE}.dim")),
        Agreement("number of heads", ("dit.n_heads", f"{ROLE}.n_heads")),
        Agreement("side of a token", ("dit.patch_size", f"{ROLE}.patch_size")),
        Agreement("number of latent channels", ("dit.in_channels", f"{ROLE}.latent_channels")),
    ),
    units=(encode_controlnet_inputs,),
    conditions={"controlnets": Condition("an image has no frames", batch="separate")},
    check=check,
    roles_at=roles_at,
)
