"""The size of a call against the memory of the machine: what certainly cannot fit is refused before anything runs.

These are lower limits, from arithmetic alone; `Pipeline.plan` returns what a call takes.
"""

from __future__ import annotations

from typing import Any

from torch import nn

from diffsynth.core.device import total_memory
from diffsynth.core.vram.managed import managed
from diffsynth.errors import NotEnoughMemory, shown
from diffsynth.runtime.interface import PlannablePipeline
from diffsynth.runtime.request import Request
from diffsynth.runtime.role import config_of, member_roles

_SIZES = {"height": 0, "width": 0, "num_frames": 1}
"""Arguments of a call that make up the size of a result -> the size in a pipeline without that argument."""


def check_size(pipe: PlannablePipeline, request: Request) -> None:
    """Raise NotEnoughMemory if the memory of this machine, or that of the device, certainly cannot hold the results of
    a call.

    Counted in host memory are 3 bytes for each pixel of the results, and 16 for each of one frame; on a device the
    weights that stay there, and with them either latents and velocity in fp32 or the decoded values: all of a tensor,
    one frame of images and videos. Not counted are activations, and what else is in use. A pipeline with a `vram_limit`
    makes a plan instead, which counts all of it. Where `schema(fits=True)` has measured the pipeline's `size_limits`,
    these are checked, too. Nothing is checked of a call without `height` and `width`.

    Args:
        pipe: the pipeline.
        request: the call, whose arguments are checked otherwise.

    Raises:
        NotEnoughMemory: with the bytes needed at least, and those that there are.
    """
    if pipe.size_limits is not None:
        pipe.size_limits.check(request.values)
    height, width, num_frames = sizes = [request.values.get(name, default) for name, default in _SIZES.items()]
    if not all(isinstance(each, int) and each >= 0 for each in sizes):
        return
    decodes, as_tensor = request.loop.output_type != "latents", request.loop.output_type == "tensor"
    pixels = height * width * request.batch_size
    host = 3 * pixels * num_frames + 16 * pixels if decodes else 0
    _refuse("this machine", "cpu", host, 0, request)
    if pipe.device.type in ("cpu", "meta") or pipe.plan_cache is not None:
        return
    latents = 8 * request.batch_size * _latent_values(pipe, height, width, num_frames)
    decoded = 3 * pixels * pipe.dtype.itemsize * (num_frames if as_tensor else 1) if decodes else 0
    needed = max(latents + least_loop_weights(pipe), decoded)
    _refuse(str(pipe.device), pipe.device, needed, resident_weights(pipe), request)


def _refuse(where: str, memory: Any, needed: int, weights: int, request: Request) -> None:
    there = total_memory(memory)
    if there is None or needed + weights <= there:
        return
    size = ", ".join(f"{name}={shown(request.values[name])}" for name in _SIZES if name in request.values)
    beside = f" beside {weights / 2**30:.1f} GiB of weights" if weights else ""
    advice = ", or load the pipeline with a policy or a vram_limit" if weights else ""
    raise NotEnoughMemory(
        f"{request.batch_size} result(s) of {size} take at least {needed // 2**30} GiB{beside}, and {where} has "
        f"{there / 2**30:.1f} GiB. Lower the size or the number{advice}"
    )


def _latent_values(pipe: PlannablePipeline, height: int, width: int, num_frames: int) -> int:
    """Return the number of values of a result's latents, at the least; 0 without an autoencoder that states its
    factor.
    """
    for part in pipe.components.values():
        config = config_of(part)
        if hasattr(config, "factor") and hasattr(config, "latent_channels"):
            frames = max(num_frames - 1, 0) // getattr(config, "time_factor", 1) + 1
            return int(config.latent_channels * (height // config.factor) * (width // config.factor) * frames)
    return 0


def resident_weights(pipe: PlannablePipeline) -> int:
    """Return the bytes of the weights that stay on the pipeline's device: those of components without a policy."""
    whole = [part for part in pipe.parts.values() if isinstance(part, nn.Module) and managed(part) is None]
    return sum(weight.nbytes for part in whole for weight in part.parameters() if weight.device == pipe.device)


def least_loop_weights(pipe: PlannablePipeline) -> int:
    """Return the bytes that a network of the loop takes on the device at the least while its blocks are streamed; 0
    without a network under a policy.
    """
    wrapped = [managed(part) for role in member_roles(pipe.loop_roles, pipe.components) if (part := pipe.parts[role])]
    footprints = [each.footprint() for each in wrapped if each is not None and each.policy.device == pipe.device]
    return min((each.on_device((), slots=1) for each in footprints), default=0)
