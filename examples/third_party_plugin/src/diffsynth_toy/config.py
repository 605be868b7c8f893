"""Config of the network, and the function that infers it from a file's shapes. Imports no torch."""

from dataclasses import dataclass

HEAD_DIM = 12
PATCH = 4
"""Constants of all variants of this network; a file with other values is another network."""


@dataclass(frozen=True, kw_only=True)
class ToyDiTConfig:
    """Config of a small transformer over patches of pixels.

    Args:
        width: hidden size, a multiple of the head dimension, 12.
        depth: number of blocks.
    """

    width: int = 24
    depth: int = 2


TINY = ToyDiTConfig(width=12, depth=1)


def tiny_inputs(config, generator):
    """Arguments of `ToyDiT.forward`: two images that are not square, prompts of different length."""
    import torch

    return {
        "pixels": torch.randn(2, 3, 3 * PATCH, 2 * PATCH, generator=generator),
        "sigma": torch.tensor([0.3, 0.8]),
        "letters": torch.tensor([[18, 5, 4], [15, 24, 0]]),
    }


def infer_config(shapes):
    """Infer the config of a file from its shapes.

    Raises:
        ValueError: the file is of another network.
    """
    width, patch = shapes["patches.weight"]
    if patch != 3 * PATCH**2 or width % HEAD_DIM:
        raise ValueError(f"patches are {patch} -> {width}; expected {3 * PATCH**2} -> a multiple of {HEAD_DIM}")
    return ToyDiTConfig(
        width=width, depth=1 + max(int(key.split(".")[1]) for key in shapes if key.startswith("blocks."))
    )
