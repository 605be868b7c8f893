"""Larger images: an upscaler after the loop, as one feature of Z-Image's pipeline."""

from typing import TypedDict

import torch

from diffsynth import Feature, Role, unit
from diffsynth.runtime.images import images_to_batch, tensor_to_images


class UpscaleArguments(TypedDict, total=False):
    """Size of the output relative to that of the decoded image.

    Args:
        upscale: Factor of height and width, which must be that of the loaded upscaler; None leaves the image as it is.
    """

    upscale: int | None


@unit("output", only_with="upscale")
def enlarge(
    upscaler, *, output, upscale: int | None = None, output_type: str, device: torch.device, dtype: torch.dtype
):
    """Return the enlarged images: a list of PIL images, or a tensor in [-1, 1] if `output_type` is "tensor"."""
    if output_type != "tensor":
        output = images_to_batch(output, height=output[0].height, width=output[0].width)
    pixels = upscaler(output.to(device, dtype))
    return pixels if output_type == "tensor" else tensor_to_images(pixels)


def check(configs, values):
    """Raise ValueError for a factor that is not that of the loaded upscaler, or for latents, which are not enlarged."""
    upscale, upscaler = values["upscale"], configs["upscaler"]
    if upscale is None:
        return
    if upscale != upscaler.factor:
        raise ValueError(f"upscale={upscale!r}: expected {upscaler.factor}, the factor of the loaded upscaler, or None")
    if values["output_type"] == "latents":
        raise ValueError(f"upscale={upscale!r} enlarges the decoded image; expected output_type='pil' or 'tensor'")


UPSCALE = Feature(
    "upscale",
    arguments=UpscaleArguments,
    roles={"upscaler": Role(architectures=("upscaler",), optional=True)},
    outputs=(enlarge,),
    check=check,
)
