"""ControlNets of FLUX.1: one or more, each with scale, start and end; Union kinds by name, and images to inpaint.

The network is in `diffsynth_flux.flux1.controlnet`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, TypedDict

import torch

from diffsynth.core.data.image import ResizeMode
from diffsynth.errors import did_you_mean
from diffsynth.models.tiles import Tiling
from diffsynth.runtime.controlnet import (
    ControlNetContext,
    ControlNetContexts,
    ControlNetInput,
    ControlNetInputs,
    active_roles,
    check_image,
    check_mask,
    config_for,
    encode_control_image,
    listed,
)
from diffsynth.runtime.feature import Condition, Configs, Feature, StepContext
from diffsynth.runtime.role import Agreement, Role
from diffsynth.runtime.unit import Phase, unit
from diffsynth_flux.flux1.controlnet import ControlNetResiduals
from diffsynth_flux.flux1.extension import Network, Stream

ROLE = "controlnet"

MODES = {"canny": 0, "tile": 1, "depth": 2, "blur": 3, "pose": 4, "gray": 5, "lq": 6}
"""Name of a kind of control image -> its index in Union-alpha."""


class ControlNetArguments(TypedDict, total=False):
    """Inputs of ControlNets.

    Args:
        controlnet_inputs: Control image, or image to inpaint with a mask that is white where it changes, with scale,
            start and end; or a list of them, for several ControlNets or several images. A Union ControlNet needs the
            kind of the image as `processor_id`, such as "canny". None uses no ControlNet.
    """

    controlnet_inputs: ControlNetInputs


class ControlNets(ControlNetContexts):
    """Extension that adds the hints of the ControlNets that are active in the step."""

    def __call__(self, dit: Network, stream: Stream) -> Stream:
        """Return the stream with the hints as residuals; see `diffsynth_flux.flux1.extension.Extension`."""
        assert stream.step is not None, "the pipeline sets it"
        for each in self.active(stream.step):
            network = stream.step.networks[ROLE][each.settings.controlnet_id]
            stream = ControlNetResiduals(network, each.latents, each.settings.scale, each.mode)(dit, stream)
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
    controlnet_modes: tuple[int, ...],
    height: int,
    width: int,
    resize_mode: ResizeMode,
    tiling: Tiling,
    device: torch.device,
    dtype: torch.dtype,
) -> ControlNets:
    """Return `ControlNets` with the encoded control images of the call.

    An image to inpaint is encoded with the masked part in black; the mask is one more channel, 1 where the image is
    kept.
    """
    contexts = []
    for each in listed(controlnet_inputs):
        latents = encode_control_image(
            vae, each, height=height, width=width, resize_mode=resize_mode, tiling=tiling, device=device, dtype=dtype
        )
        mode = mode_of(each.processor_id) if controlnet_modes[each.controlnet_id] else None
        contexts.append(ControlNetContext(latents, each, mode))
    return ControlNets(tuple(contexts))


def mode_of(processor_id: Any) -> int:
    """Return the index of a kind of control image, an int.

    Args:
        processor_id: one of `MODES`, or the index itself.

    Raises:
        ValueError: no such kind.
    """
    if isinstance(processor_id, int) and not isinstance(processor_id, bool):
        return processor_id
    if processor_id in MODES:
        return MODES[processor_id]
    raise ValueError(
        f"controlnet_inputs: processor_id={processor_id!r}: a Union ControlNet needs the kind of the image, one of "
        f"{', '.join(MODES)}, or an index{did_you_mean(str(processor_id), MODES)}"
    )


def check(configs: Configs, values: Mapping[str, Any]) -> None:
    """Raise an error for control images that no loaded ControlNet takes.

    Raises:
        ValueError: an index of no ControlNet, an input without an image, a mask that is missing or not taken, or an
            unknown kind of image.
    """
    networks = configs[ROLE]
    for each in listed(values["controlnet_inputs"]):
        check_image(each, argument="controlnet_inputs")
        if networks is not None:
            _check_input(each, networks)


def _check_input(each: ControlNetInput, networks: Sequence[Any]) -> None:
    index, config = each.controlnet_id, config_for(each, networks, argument="controlnet_inputs")
    check_mask(each, inpaints=config.inpaints, argument="controlnet_inputs")
    if config.num_modes:
        if mode_of(each.processor_id) not in range(config.num_modes):
            raise ValueError(
                f"controlnet_inputs: processor_id={each.processor_id!r}, and ControlNet {index} has {config.num_modes} "
                "kinds of control images"
            )
    elif each.processor_id is not None and each.processor_id not in MODES:
        mode_of(each.processor_id)


def roles_at(step: StepContext, values: Mapping[str, Any]) -> tuple[str, ...]:
    """Return a tuple of the roles of the ControlNets that run in a step."""
    return active_roles(ROLE, values.get("controlnets"), step)


CONTROLNET = Feature(
    "controlnet",
    arguments=ControlNetArguments,
    roles={ROLE: Role(architectures=("flux_controlnet",), optional=True, many=True)},
    loop_roles=(ROLE,),
    facts={"controlnet_modes": f"{ROLE}.num_modes"},
    units=(encode_controlnet_inputs,),
    conditions={"controlnets": Condition("an image has no frames", batch="separate")},
    check=check,
    roles_at=roles_at,
    agreements=(Agreement("width of the tokens", (f"{ROLE}.dim", "dit.dim")),),
)
