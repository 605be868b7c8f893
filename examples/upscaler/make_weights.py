"""Write a file of random weights: `python make_weights.py upscaler.safetensors`."""

import sys
from pathlib import Path

import torch

from diffsynth.core.loader.save import save_checkpoint
from diffsynth_upscaler.config import UpscalerConfig
from diffsynth_upscaler.upscaler import Upscaler


def main(file: Path) -> None:
    """Write random bf16 weights of a small upscaler."""
    torch.manual_seed(0)
    config = UpscalerConfig(width=16, depth=2)
    save_checkpoint(Upscaler(config), file, architecture="upscaler", config=config, dtype=torch.bfloat16)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
