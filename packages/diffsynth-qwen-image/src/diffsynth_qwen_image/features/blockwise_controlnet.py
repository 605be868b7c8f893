"""Block-wise ControlNets of Qwen-Image (Canny, Depth, Inpaint): one or more, each with scale, start and end.

The network is in `diffsynth_qwen_image.blockwise_controlnet`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, TypedDict

import torch

from diffsynth.core.data.image import ResizeMode
from diffsynth.models.tiles import Tiling
from diffsynth.runtime.controlnet import ControlNetContexts, ControlNetInputs, active_roles
from diffsynth.runtime.feature import Condition, Configs, Feature, StepContext
from diffsynth.runtime.role import Agreement, Role
from diffsynth.runtime.unit import Phase, unit
from diffsynth_qwen_image.blockwise_controlnet import BlockwiseResiduals, Control
from diffsynth_qwen_image.control_images import check_inputs, encode_inputs
from diffsynth_qwen_image.controlnet_config import BLOCKWISE_CONTROLNET as ARCHITECTURE
from diffsynth_qwen_image.extension import Network, Stream

ROLE = "blockwise_controlnet"


class BlockwiseControlNetArguments(TypedDict, total=False):
    """Inputs of block-wise ControlNets.

    Args:
        blockwise_controlnet_inputs: Control image for a block-wise ControlNet, or image to inpaint with a mask that is
            white where it changes, with scale, start and end; or a list of them, for several ControlNets or several
            images. None uses no block-wise ControlNet.
    """

    blockwise_controlnet_inputs: ControlNetInputs


class BlockwiseControlNets(ControlNetContexts):
    """Extension that adds the hints of the block-wise ControlNets that are active in the step."""

    def __call__(self, dit: Network, stream: Stream) -> Stream:
        """Return the stream with the hints as residuals; see `diffsynth_qwen_image.extension.Extension`."""
        assert stream.step is not None, "the pipeline sets it"
        networks = stream.step.networks[ROLE]
        controls = [
            Control(networks[each.settings.controlnet_id], each.latents, each.settings.scale)
            for each in self.active(stream.step)
        ]
        return BlockwiseResiduals(controls)(dit, stream)


@unit("blockwise_controlnets", phase=Phase.ENCODE, only_with="blockwise_controlnet_inputs")
def encode_blockwise_inputs(
    vae: Any,
    *,
    blockwise_controlnet_inputs: ControlNetInputs = None,
    height: int,
    width: int,
    resize_mode: ResizeMode,
    tiling: Tiling,
    device: torch.device,
    dtype: torch.dtype,
) -> BlockwiseControlNets:
    """Return `BlockwiseControlNets` with the encoded control images of the call."""
    size = {"height": height, "width": width, "resize_mode": resize_mode}
    inputs = blockwise_controlnet_inputs
    return BlockwiseControlNets(encode_inputs(vae, inputs, **size, tiling=tiling, device=device, dtype=dtype))


def check(configs: Configs, values: Mapping[str, Any]) -> None:
    """Raise an error for control images that no loaded ControlNet takes; see `check_inputs`."""
    check_inputs(configs, values, role=ROLE, other="controlnet")


def roles_at(step: StepContext, values: Mapping[str, Any]) -> tuple[str, ...]:
    """Return a tuple of the roles of the ControlNets that run in a step."""
    return active_roles(ROLE, values.get("blockwise_controlnets"), step)


BLOCKWISE_CONTROLNET = Feature(
    "blockwise_controlnet",
    arguments=BlockwiseControlNetArguments,
    roles={ROLE: Role(architectures=(ARCHITECTURE,), optional=True, many=True)},
    loop_roles=(ROLE,),
    agreements=(
        Agreement("width of the tokens", ("dit.dim", f"{ROLE}.dim")),
        Agreement("number of blocks", ("dit.n_layers", f"{ROLE}.n_layers")),
        Agreement("number of latent channels", ("dit.in_channels", f"{ROLE}.in_channels")),
    ),
    units=(encode_blockwise_inputs,),
    conditions={"blockwise_controlnets": Condition("an image has no frames", batch="separate")},
    check=check,
    roles_at=roles_at,
)
