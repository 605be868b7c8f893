"""Compare whole calls of Z-Image with diffusers.

    python benchmarks/z_image.py                       on a GPU: published sizes, random weights, bf16
    python benchmarks/z_image.py --tiny                tiny sizes in fp32 on the CPU

The cases are Z-Image-Turbo with 9 steps, and Z-Image-Turbo with a ControlNet (2.1). `image_calls.py` describes what is
measured.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from typing import Any

import image_calls
import torch
from image_calls import TINY_AUTOENCODER, Benchmark, Case, Line
from PIL import Image
from torch import nn

from diffsynth.models.config import FluxAutoencoderConfig, Qwen3TextEncoderConfig
from diffsynth.models.flux_autoencoder import FluxAutoencoder
from diffsynth.models.qwen3 import Qwen3TextEncoder
from diffsynth.runtime.controlnet import ControlNetInput
from diffsynth.testing.tiny_processors import byte_tokenizer
from diffsynth_zimage import ZImagePipeline
from diffsynth_zimage.config import ZImageControlNetConfig, ZImageDiTConfig
from diffsynth_zimage.controlnet import ZImageControlNet
from diffsynth_zimage.dit import ZImageDiT


class ZImage(Line):
    """Z-Image-Turbo, which has no guidance."""

    networks = {
        "dit": (ZImageDiTConfig, ZImageDiT),
        "text_encoder": (Qwen3TextEncoderConfig, Qwen3TextEncoder),
        "vae": (FluxAutoencoderConfig, FluxAutoencoder),
    }

    def their_networks(self, configs: Mapping[str, Any]) -> dict[str, nn.Module]:
        """Return a dict component of diffusers' pipeline -> network of the same size; on the current default device."""
        from diffusers import ZImageTransformer2DModel
        from transformers import Qwen3Config, Qwen3Model

        dit, text = configs["dit"], configs["text_encoder"]
        names = ("in_channels", "dim", "n_layers", "n_refiner_layers", "n_heads", "n_kv_heads", "cap_feat_dim")
        return {
            "transformer": ZImageTransformer2DModel(
                **{name: getattr(dit, name) for name in names}, axes_dims=list(dit.axes_dims)
            ),
            "text_encoder": Qwen3Model(
                Qwen3Config(
                    **image_calls.their_language_model(text),
                    head_dim=text.head_dim,
                    rope_parameters={"rope_theta": text.rope_theta, "rope_type": "default"},
                )
            ),
            "vae": image_calls.their_flux_autoencoder(configs["vae"]),
        }

    def our_pipeline(self, parts: Mapping[str, nn.Module], device: torch.device, dtype: torch.dtype) -> Any:
        """Return our pipeline of networks."""
        return ZImagePipeline.from_components(**parts, tokenizer=byte_tokenizer(), device=device, torch_dtype=dtype)

    def their_pipeline(self, parts: Mapping[str, nn.Module]) -> Any:
        """Return diffusers' pipeline of networks."""
        from diffusers import FlowMatchEulerDiscreteScheduler
        from diffusers import ZImagePipeline as TheirPipeline

        return TheirPipeline(FlowMatchEulerDiscreteScheduler(shift=3.0), tokenizer=byte_tokenizer(), **parts)

    def their_arguments(self, pipe: Any, side: int) -> dict[str, Any]:
        """Return further arguments of diffusers' call: no guidance."""
        return {"guidance_scale": 0.0}


class ControlledZImage(ZImage):
    """Z-Image-Turbo with a ControlNet."""

    networks = {**ZImage.networks, "controlnet": (ZImageControlNetConfig, ZImageControlNet)}

    def their_networks(self, configs: Mapping[str, Any]) -> dict[str, nn.Module]:
        """Return a dict component of diffusers' pipeline -> network of the same size; on the current default device."""
        from diffusers import ZImageControlNetModel

        config, layers = configs["controlnet"], configs["dit"].n_layers
        controlnet = ZImageControlNetModel(
            **{name: getattr(config, name) for name in ("dim", "n_heads", "n_kv_heads", "n_refiner_layers")},
            control_layers_places=list(range(0, layers, layers // config.n_layers)),
            control_refiner_layers_places=list(range(config.n_refiner_layers)),
            control_in_dim=config.in_channels,
            add_control_noise_refiner=config.refiner_hints,
        )
        return {**super().their_networks(configs), "controlnet": controlnet}

    def their_pipeline(self, parts: Mapping[str, nn.Module]) -> Any:
        """Return diffusers' pipeline of networks."""
        from diffusers import FlowMatchEulerDiscreteScheduler, ZImageControlNetPipeline

        scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)
        return ZImageControlNetPipeline(scheduler, tokenizer=byte_tokenizer(), **parts)

    def our_arguments(self, side: int) -> dict[str, Any]:
        """Return further arguments of our call: a condition image."""
        return {"controlnet_inputs": ControlNetInput(image=_grey(side))}

    def their_arguments(self, pipe: Any, side: int) -> dict[str, Any]:
        """Return further arguments of diffusers' call: a condition image, no guidance."""
        image = {"control_image": _grey(side), "controlnet_conditioning_scale": 1.0}
        return image | super().their_arguments(pipe, side)


def _grey(side: int) -> Image.Image:
    return Image.new("RGB", (side, side), "grey")


TINY_BLOCK = {"dim": 64, "n_heads": 2, "n_kv_heads": 2, "n_refiner_layers": 1}
TINY_SIZES = {
    "dit": TINY_BLOCK | {"n_layers": 2, "cap_feat_dim": 64, "axes_dims": (8, 12, 12)},
    "text_encoder": {"hidden_size": 64, "num_layers": 3, "num_heads": 2, "num_kv_heads": 1, "head_dim": 32}
    | {"intermediate_size": 96, "vocab_size": 512},
    "vae": TINY_AUTOENCODER,
    "controlnet": TINY_BLOCK | {"n_layers": 1},
}
FULL = {"z-image-turbo": Case(ZImage(), 9, 1024), "controlnet": Case(ControlledZImage(), 9, 1024)}
TINY = {
    "z-image-turbo": Case(ZImage(), 9, 64, TINY_SIZES),
    "controlnet": Case(ControlledZImage(), 9, 64, TINY_SIZES),
}
BENCHMARK = Benchmark(__file__, "diffsynth-zimage", FULL, TINY, goals={"z-image-turbo": 0.90})

if __name__ == "__main__":
    sys.exit(image_calls.main(BENCHMARK, __doc__))
