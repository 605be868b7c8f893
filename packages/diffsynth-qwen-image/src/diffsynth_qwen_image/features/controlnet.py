"""ControlNets of Qwen-Image that copy blocks of its transformer (Union, Inpainting): one or more, each with scale,
start and end.

The network is in `diffsynth_qwen_image.controlnet`; block-wise ControlNets are the feature `blockwise_controlnet`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, TypedDict

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from diffsynth.core.data.image import ResizeMode
from diffsynth.models.tiles import Tiling
from diffsynth.runtime.controlnet import ControlNetContexts, ControlNetInputs, active_roles
from diffsynth.runtime.feature import Condition, Configs, Feature, StepContext
from diffsynth.runtime.role import Agreement, Role
from diffsynth.runtime.unit import Phase, unit
from diffsynth_qwen_image.control_images import check_inputs, encode_inputs
from diffsynth_qwen_image.controlnet import ControlNetResiduals
from diffsynth_qwen_image.controlnet_config import CONTROLNET as ARCHITECTURE
from diffsynth_qwen_image.extension import Inputs, Network, Stream

ROLE = "controlnet"


class ControlNetArguments(TypedDict, total=False):
    """Inputs of ControlNets.

    Args:
        controlnet_inputs: Control image for Qwen-Image-ControlNet-Union, or image to inpaint for -Inpainting with a
            mask that is white where it changes, with scale, start and end; or a list of them, for several ControlNets
            or several images. None uses no ControlNet.
    """

    controlnet_inputs: ControlNetInputs


@dataclass(frozen=True, eq=False)
class ControlNets(ControlNetContexts):
    """Extension that adds the hints of the ControlNets that are active in the step.

    Args:
        contexts: the encoded control images.
        prompt_embeds, prompt_mask: of the branch `cond`: as in diffusers, every branch gets the hints of the prompt.
    """

    prompt_embeds: Float[Tensor, "b s e"]
    prompt_mask: Bool[Tensor, "b s"] | None

    def __call__(self, dit: Network, stream: Stream) -> Stream:
        """Return the stream with the hints as residuals; see `diffsynth_qwen_image.extension.Extension`."""
        assert stream.step is not None, "the pipeline sets it"
        inputs = Inputs(stream.inputs.latents, stream.inputs.sigma, self.prompt_embeds, self.prompt_mask)
        for each in self.active(stream.step):
            network = stream.step.networks[ROLE][each.settings.controlnet_id]
            stream = ControlNetResiduals(network, each.latents, each.settings.scale, inputs)(dit, stream)
        return stream


@unit("controlnets", phase=Phase.ENCODE, only_with="controlnet_inputs", of_branch="cond")
def encode_controlnet_inputs(
    vae: Any,
    *,
    controlnet_inputs: ControlNetInputs = None,
    prompt_embeds: Float[Tensor, "b s e"],
    prompt_mask: Bool[Tensor, "b s"] | None,
    height: int,
    width: int,
    resize_mode: ResizeMode,
    tiling: Tiling,
    device: torch.device,
    dtype: torch.dtype,
) -> ControlNets:
    """Return `ControlNets` with the encoded control images and the prompt of the call."""
    size = {"height": height, "width": width, "resize_mode": resize_mode}
    contexts = encode_inputs(vae, controlnet_inputs, **size, tiling=tiling, device=device, dtype=dtype)
    return ControlNets(contexts, prompt_embeds, prompt_mask)


def check(configs: Configs, values: Mapping[str, Any]) -> None:
    """Raise an error for control images that no loaded ControlNet takes; see `check_inputs`."""
    check_inputs(configs, values, role=ROLE, other="blockwise_controlnet")


def roles_at(step: StepContext, values: Mapping[str, Any]) -> tuple[str, ...]:
    """Return a tuple of the roles of the ControlNets that run in a step."""
    return active_roles(ROLE, values.get("controlnets"), step)


CONTROLNET = Feature(
    "controlnet",
    arguments=ControlNetArguments,
    roles={ROLE: Role(architectures=(ARCHITECTURE,), optional=True, many=True)},
    loop_roles=(ROLE,),
    agreements=(
        Agreement("width of the tokens", ("dit.dim", f"{ROLE}.dim")),
        Agreement("number of latent channels", ("dit.in_channels", f"{ROLE}.in_channels")),
        Agreement("width of the text encoder", ("dit.prompt_dim", f"{ROLE}.prompt_dim")),
    ),
    units=(encode_controlnet_inputs,),
    conditions={"controlnets": Condition("an image has no frames", batch="separate")},
    check=check,
    roles_at=roles_at,
)
