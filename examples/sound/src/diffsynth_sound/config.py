"""Config of the network, and the function that infers it from a file's shapes. Imports no torch."""

from dataclasses import dataclass

HEAD_DIM = 8
PATCH = 16
SAMPLE_RATE = 8000
"""Constants of all variants of this network: size of an attention head, samples in a token, samples per second."""


@dataclass(frozen=True, kw_only=True)
class SoundNetConfig:
    """Config of a transformer over patches of a waveform.

    Args:
        channels: of the sound, 1 or 2.
        width: hidden size, a multiple of the head dimension, 8.
        depth: number of blocks.
    """

    channels: int = 1
    width: int = 24
    depth: int = 2


TINY = SoundNetConfig(channels=2, width=8, depth=1)


def tiny_inputs(config, generator):
    """Arguments of `SoundNet.forward`: two sounds of five tokens."""
    import torch

    return {
        "samples": torch.randn(2, config.channels, 5 * PATCH, generator=generator),
        "sigma": torch.tensor([0.3, 0.8]),
        "frequencies": torch.tensor([220.0, 440.0]),
    }


def infer_config(shapes):
    """Infer the config of a file from its shapes.

    Raises:
        ValueError: the file is of another network.
    """
    width, channels, patch = shapes["first.weight"]
    if patch != PATCH or width % HEAD_DIM:
        raise ValueError(f"patches are {patch} -> {width}; expected {PATCH} -> a multiple of {HEAD_DIM}")
    return SoundNetConfig(
        channels=channels,
        width=width,
        depth=1 + max(int(key.split(".")[1]) for key in shapes if key.startswith("blocks.")),
    )
