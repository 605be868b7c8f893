"""Write random weights to the package, as diffusers writes them: `python make_weights.py`."""

from pathlib import Path

import torch
from safetensors.torch import save_file

from diffsynth_unet.config import UNetConfig
from diffsynth_unet.unet import UNet

FILE = Path(__file__).parent / "src" / "diffsynth_unet" / "diffusion_pytorch_model.safetensors"


def main(file=FILE):
    """Write bf16 weights to `file`, by default in the package; they are the same each time."""
    torch.manual_seed(0)
    net = UNet(UNetConfig()).to(torch.bfloat16)
    save_file(net.unet.state_dict(), file, metadata={"format": "pt"})


if __name__ == "__main__":
    main()
