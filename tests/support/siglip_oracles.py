"""Image encoders of SigLIP and SigLIP 2 of transformers, with random weights, and the processor of SigLIP 2."""

from __future__ import annotations

from typing import TypeVar

import numpy as np
import torch
from PIL import Image
from torch import nn
from transformers import Siglip2VisionConfig, Siglip2VisionModel, SiglipVisionConfig, SiglipVisionModel
from transformers.models.siglip2.image_processing_pil_siglip2 import Siglip2ImageProcessorPil

from diffsynth.models.image_config import SiglipImageEncoderConfig
from diffsynth_zimage.config import TINY_SIGLIP2, Siglip2ImageEncoderConfig
from parity import draw_weights

Network = TypeVar("Network", bound=nn.Module)

SIZES = [(64, 64), (176, 208), (300, 50), (1000, 37), (16, 16)]
"""Widths and heights of images, of usual and of extreme aspect ratios."""


def photo(width: int, height: int) -> Image.Image:
    """Return an image of random pixels."""
    pixels = np.random.default_rng(width).integers(0, 255, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def siglip2_processed(image: Image.Image) -> dict[str, torch.Tensor]:
    """Return what transformers' processor makes of an image for `TINY_SIGLIP2`."""
    processor = Siglip2ImageProcessorPil(
        patch_size=TINY_SIGLIP2.patch_size, max_num_patches=TINY_SIGLIP2.max_patches, do_convert_rgb=True
    )
    return dict(processor(images=[image], return_tensors="pt"))


def siglip_oracle(config: SiglipImageEncoderConfig) -> SiglipVisionModel:
    """Return the network of SigLIP, or of SigLIP 2 at a fixed size, with transformers' own attention."""
    return _drawn(
        SiglipVisionModel(
            SiglipVisionConfig(
                hidden_size=config.hidden_size,
                intermediate_size=config.intermediate_size,
                num_hidden_layers=config.num_layers,
                num_attention_heads=2,
                image_size=config.image_size,
                patch_size=config.patch_size,
                attn_implementation="eager",
            )
        )
    )


def siglip2_oracle(config: Siglip2ImageEncoderConfig) -> Siglip2VisionModel:
    """Return the network of SigLIP 2 for images of any size, with transformers' own attention."""
    return _drawn(
        Siglip2VisionModel(
            Siglip2VisionConfig(
                hidden_size=config.hidden_size,
                intermediate_size=config.intermediate_size,
                num_hidden_layers=config.num_layers,
                num_attention_heads=config.num_heads,
                num_patches=config.num_positions,
                patch_size=config.patch_size,
                vision_use_head=False,
                attn_implementation="eager",
            )
        )
    )


def _drawn(network: Network) -> Network:
    """Return the network with random weights; attention is sharp, so that the bias of the queries has an effect."""
    shapes = {name: tuple(parameter.shape) for name, parameter in network.named_parameters()}
    with torch.no_grad():
        for name, weight in draw_weights(shapes, seed=5).items():
            sharp = "q_proj" in name or name.endswith("in_proj_weight")
            network.get_parameter(name).copy_(3 * weight if sharp else weight)
    return network.eval()
