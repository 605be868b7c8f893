"""Tiny ControlNets of FLUX.1 under the file names of the hub."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from diffsynth.core.loader.save import save_checkpoint
from diffsynth_flux.flux1.config import TINY_CONTROLNET
from diffsynth_flux.flux1.controlnet import FluxControlNet
from diffsynth_flux.flux1.models import TINY_DIT

CONTROLNETS = {
    "InstantX/FLUX.1-dev-Controlnet-Union-alpha": {"num_modes": 10},
    "alimama-creative/FLUX.1-dev-Controlnet-Inpainting-Beta": {"num_modes": 0, "control_channels": 68},
    "jasperai/Flux.1-dev-Controlnet-Upscaler": {"num_modes": 0},
}
"""Repository of a ControlNet -> fields of its config."""


def write_controlnets(root: Path) -> None:
    """Write the ControlNets of `CONTROLNETS` below the root of a tiny hub."""
    for model_id, fields in CONTROLNETS.items():
        path = root / model_id / "diffusion_pytorch_model.safetensors"
        path.parent.mkdir(parents=True, exist_ok=True)
        config = replace(TINY_CONTROLNET, **TINY_DIT, **fields)
        saved = {"architecture": "flux_controlnet", "config": config, "layout": "flux_controlnet"}
        save_checkpoint(FluxControlNet(config), path, **saved)
