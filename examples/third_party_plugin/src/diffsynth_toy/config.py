"""Sizes of the network, and how a file's shapes tell them. Light: no torch at import."""

from dataclasses import dataclass

HEAD_DIM = 12
PATCH = 4
"""What all sizes of this network share; a file in which they do not hold is another network."""


@dataclass(frozen=True, kw_only=True)
class ToyDiTConfig:
    """A small transformer over patches of pixels.

    Args:
        width: of the stream, a multiple of the head dimension, 12.
        depth: number of blocks.
    """

    width: int = 24
    depth: int = 2


TINY = ToyDiTConfig(width=12, depth=1)


def tiny_inputs(config, generator):
    """Arguments of `ToyDiT.forward`: two pictures that are not square, prompts of different length."""
    import torch

    return {
        "pixels": torch.randn(2, 3, 3 * PATCH, 2 * PATCH, generator=generator),
        "sigma": torch.tensor([0.3, 0.8]),
        "letters": torch.tensor([[18, 5, 4], [15, 24, 0]]),
    }


def infer_config(shapes):
    """The config of a file, from its shapes.

    Raises:
        ValueError: it is another network.
    """
    width, patch = shapes["patches.weight"]
    if patch != 3 * PATCH**2 or width % HEAD_DIM:
        raise ValueError(f"patches are {patch} -> {width}; expected {3 * PATCH**2} -> a multiple of {HEAD_DIM}")
    return ToyDiTConfig(
        width=width, depth=1 + max(int(key.split(".")[1]) for key in shapes if key.startswith("blocks."))
    )
