"""Config of the upscaler, and the function that infers it from a file's shapes. Imports no torch."""

from dataclasses import dataclass
from math import isqrt

from diffsynth.core.loader.shapes import count_items


@dataclass(frozen=True, kw_only=True)
class UpscalerConfig:
    """Config of the upscaler.

    Args:
        factor: of height and width.
        width: number of channels.
        depth: number of blocks.
    """

    factor: int = 2
    width: int = 64
    depth: int = 4


TINY = UpscalerConfig(width=8, depth=2)


def tiny_inputs(config, generator):
    """Arguments of `Upscaler.forward`: two images that are not square."""
    import torch

    return {"image": torch.rand(2, 3, 6, 10, generator=generator) * 2 - 1}


def infer_config(shapes):
    """Infer the config of a file from its shapes.

    Raises:
        ValueError: the file is of another network.
    """
    channels, width, *kernel = shapes["last.weight"]
    factor = isqrt(channels // 3)
    if kernel != [3, 3] or channels != 3 * factor**2 or shapes["first.weight"] != (width, 3, 3, 3):
        raise ValueError(f"last.weight is {shapes['last.weight']}; expected 3 x 3 kernels of 3 * factor ** 2 channels")
    return UpscalerConfig(factor=factor, width=width, depth=count_items(shapes, "blocks"))
