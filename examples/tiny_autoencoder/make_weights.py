"""Write a file of random weights: `python make_weights.py tinyae.safetensors`."""

import sys
from pathlib import Path

import torch

from diffsynth.core.loader.save import save_checkpoint
from diffsynth_tinyae.config import TinyAutoencoderConfig
from diffsynth_tinyae.vae import TinyAutoencoder


def main(file: Path, config: TinyAutoencoderConfig) -> None:
    """Write random bf16 weights of an autoencoder; the same config gives the same file."""
    torch.manual_seed(0)
    net = TinyAutoencoder(config)
    save_checkpoint(net, file, architecture="tiny_autoencoder", config=config, dtype=torch.bfloat16)


if __name__ == "__main__":
    # z-image-nano has 32 latent channels; Z-Image and FLUX.1 have 16.
    blocks = {"encoder_blocks": (1, 1, 1, 1), "decoder_blocks": (1, 1, 1, 1)}
    main(Path(sys.argv[1]), TinyAutoencoderConfig(latent_channels=32, width=8, **blocks))
