"""Write a file of random weights: `python make_weights.py sketch.safetensors`."""

import sys
from pathlib import Path

import torch

from diffsynth.core.loader.save import save_checkpoint
from diffsynth_sketch.config import SketchControlNetConfig
from diffsynth_sketch.controlnet import SketchControlNet


def main(file: Path, seed: int = 0) -> None:
    """Write random bf16 weights of a ControlNet for z-image-nano, which has 6 layers over tokens of width 192."""
    torch.manual_seed(seed)
    config = SketchControlNetConfig(dim=192, width=32, depth=3)
    save_checkpoint(
        SketchControlNet(config), file, architecture="sketch_controlnet", config=config, dtype=torch.bfloat16
    )


if __name__ == "__main__":
    main(Path(sys.argv[1]))
