"""Config of the ControlNet, and the function that infers it from a file's shapes. Imports no torch."""

from dataclasses import dataclass

from diffsynth.core.loader.shapes import count_items

TOKEN = 16
"""Height and width, in pixels, of the part of an image that is one token of Z-Image's transformer."""


@dataclass(frozen=True, kw_only=True)
class SketchControlNetConfig:
    """Config of the ControlNet.

    Args:
        dim: width of the transformer's tokens; 3840 is Z-Image's.
        width: number of channels in the ControlNet.
        depth: number of blocks; each gives a hint to one of the transformer's layers, so it divides their number.
    """

    dim: int = 3840
    width: int = 64
    depth: int = 3


TINY = SketchControlNetConfig(dim=24, width=8, depth=2)


def tiny_inputs(config, generator):
    """Arguments of `SketchControlNet.forward`: a sketch of 3 x 2 tokens for two images."""
    import torch

    return {
        "tokens": torch.randn(2, 6, config.dim, generator=generator),
        "sketch": torch.rand(1, 1, 3 * TOKEN, 2 * TOKEN, generator=generator) * 2 - 1,
    }


def infer_config(shapes):
    """Infer the config of a file from its shapes.

    Raises:
        ValueError: the file is of another network.
    """
    dim, width = shapes["blocks.0.hint.weight"]
    if shapes["sketch.weight"] != (width, TOKEN**2):
        raise ValueError(f"sketch.weight is {shapes['sketch.weight']}; expected {(width, TOKEN**2)}")
    return SketchControlNetConfig(dim=dim, width=width, depth=count_items(shapes, "blocks"))
