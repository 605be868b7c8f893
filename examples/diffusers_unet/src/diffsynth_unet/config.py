"""Config of the network, and the function that infers it from a file's shapes. Imports no torch."""

from dataclasses import dataclass

GROUPS = 4
HEAD_DIM = 8
"""Constants of all variants of this network: groups of its normalization, and the size of an attention head."""


@dataclass(frozen=True, kw_only=True)
class UNetConfig:
    """Config of an unconditional `UNet2DModel`.

    Args:
        channels: of the images.
        widths: channels at each resolution, multiples of 8, full resolution first; at most 4.
        layers: residual blocks at each resolution.
        attention: whether there is self-attention, for each resolution.
    """

    channels: int = 3
    widths: tuple[int, ...] = (8, 16)
    layers: int = 1
    attention: tuple[bool, ...] = (False, True)

    def __post_init__(self):
        for name in ("widths", "attention"):
            object.__setattr__(self, name, tuple(getattr(self, name)))  # metadata is JSON, which has lists


TINY = UNetConfig()


def tiny_inputs(config, generator):
    """Arguments of `UNet.forward`: two images that are not square."""
    import torch

    pixels = torch.randn(2, config.channels, 8, 16, generator=generator)
    return {"pixels": pixels, "timestep": torch.tensor([7.0, 812.5])}


def infer_config(shapes):
    """Infer the config of a file from its shapes.

    Raises:
        ValueError: the file is of another network.
    """
    blocks = "unet.down_blocks"
    levels = 1 + max(int(key.split(".")[2]) for key in shapes if key.startswith(blocks))
    widths = tuple(shapes[f"{blocks}.{level}.resnets.0.conv1.weight"][0] for level in range(levels))
    if levels > 4 or any(width % HEAD_DIM for width in widths):
        raise ValueError(f"the widths are {widths}; expected at most 4, multiples of {HEAD_DIM}")
    return UNetConfig(
        channels=shapes["unet.conv_in.weight"][1],
        widths=widths,
        layers=1 + max(int(key.split(".")[4]) for key in shapes if key.startswith(f"{blocks}.0.resnets")),
        attention=tuple(f"{blocks}.{level}.attentions.0.to_q.weight" in shapes for level in range(levels)),
    )
