"""Config of the network, and the function that infers it from a file's shapes. Imports no torch."""

from dataclasses import dataclass

GROUPS = 4
HEAD_DIM = 8
"""Constants of all variants of this network: groups of its normalization, and the size of an attention head."""


@dataclass(frozen=True, kw_only=True)
class PixelUNetConfig:
    """Config of a UNet with two levels of resolution.

    Args:
        width: channels of every layer, a multiple of 8.
        num_classes: classes of images; the label `num_classes` is the null class of guidance.
    """

    width: int = 16
    num_classes: int = 10


TINY = PixelUNetConfig(width=8, num_classes=3)


def tiny_inputs(config, generator):
    """Arguments of `PixelUNet.forward`: two images that are not square, one of the null class."""
    import torch

    return {
        "pixels": torch.randn(2, 3, 8, 12, generator=generator),
        "timestep": torch.tensor([7.0, 812.5]),
        "labels": torch.tensor([1, config.num_classes]),
    }


def infer_config(shapes):
    """Infer the config of a file from its shapes.

    Raises:
        ValueError: the file is of another network.
    """
    labels, width = shapes["labels.weight"]
    if shapes["first.weight"] != (width, 3, 3, 3) or width % HEAD_DIM:
        raise ValueError(
            f"first.weight is {shapes['first.weight']}; expected ({width}, 3, 3, 3), width a multiple of 8"
        )
    return PixelUNetConfig(width=width, num_classes=labels - 1)
