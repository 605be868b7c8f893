"""Write random weights to the package: `python make_weights.py`."""

from pathlib import Path

import torch

from diffsynth.core.loader.save import save_checkpoint
from diffsynth_sound.config import SoundNetConfig
from diffsynth_sound.net import SoundNet

FILE = Path(__file__).parent / "src" / "diffsynth_sound" / "net.safetensors"


def main(file=FILE):
    """Write bf16 weights to `file`, by default in the package; they are the same each time."""
    torch.manual_seed(0)
    config = SoundNetConfig()
    save_checkpoint(SoundNet(config), file, architecture="sound_net", config=config, dtype=torch.bfloat16)


if __name__ == "__main__":
    main()
