"""Write random weights to the package: `python make_weights.py`."""

from pathlib import Path

import torch

from diffsynth.core.loader.save import save_checkpoint
from diffsynth_pixelddpm.config import PixelUNetConfig
from diffsynth_pixelddpm.unet import PixelUNet

FILE = Path(__file__).parent / "src" / "diffsynth_pixelddpm" / "unet.safetensors"


def main(file=FILE):
    """Write bf16 weights to `file`, by default in the package; they are the same each time."""
    torch.manual_seed(0)
    config = PixelUNetConfig()
    save_checkpoint(PixelUNet(config), file, architecture="pixel_unet", config=config, dtype=torch.bfloat16)


if __name__ == "__main__":
    main()
