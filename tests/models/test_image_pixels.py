"""Pixels that image encoders read equal those of transformers' processors."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image
from transformers.models.siglip.image_processing_pil_siglip import SiglipImageProcessorPil

from diffsynth.models.image_pixels import dinov3_pixels, siglip_pixels


def random_image(width: int, height: int, mode: str = "RGB") -> Image.Image:
    levels = np.random.default_rng(5).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(levels).convert(mode)


@pytest.mark.parametrize("resample", [Image.Resampling.BICUBIC, Image.Resampling.BILINEAR])
def test_siglip_pixels_equal_those_of_transformers(resample):
    image = random_image(61, 37)
    processor = SiglipImageProcessorPil(size={"height": 32, "width": 32}, resample=resample)
    expected = processor(images=image, return_tensors="pt")["pixel_values"]
    assert float((siglip_pixels(image, 32, resample=resample) - expected).abs().max()) < 1e-6


def test_siglip_pixels_equal_those_of_torchvision():
    pytest.importorskip("torchvision", reason="transformers' image processor of SigLIP needs torchvision")
    from transformers import SiglipImageProcessor

    image = random_image(61, 37)
    processor = SiglipImageProcessor(size={"height": 32, "width": 32}, resample=Image.Resampling.BILINEAR)
    expected = processor(images=image, return_tensors="pt")["pixel_values"]
    got = siglip_pixels(image, 32, resample=Image.Resampling.BILINEAR)
    # torchvision scales levels with other rounding: by up to one of 255.
    assert float((got - expected).abs().max()) < 2.1 / 255


@pytest.mark.parametrize(("width", "height"), [(61, 37), (20, 24), (32, 32)])
def test_dinov3_pixels(width, height):
    """Pillow scales single channels of unrounded levels with the same filter."""
    image = random_image(width, height)
    channels = [Image.fromarray(np.asarray(image, dtype=np.float32)[:, :, channel] / 255) for channel in range(3)]
    scaled = np.stack([np.asarray(each.resize((32, 32), Image.Resampling.BILINEAR)) for each in channels])
    expected = (scaled - np.array([[[0.485]], [[0.456]], [[0.406]]])) / np.array([[[0.229]], [[0.224]], [[0.225]]])
    got = dinov3_pixels(image, 32)
    assert got.shape == (1, 3, 32, 32)
    assert float((got[0].double() - torch.from_numpy(expected)).abs().max()) < 2e-5


def test_dinov3_pixels_equal_those_of_transformers():
    pytest.importorskip("torchvision", reason="transformers' image processor of DINOv3 needs torchvision")
    from transformers import DINOv3ViTImageProcessor

    image = random_image(61, 37)
    expected = DINOv3ViTImageProcessor()(images=image, return_tensors="pt")["pixel_values"]
    assert float((dinov3_pixels(image, 224) - expected).abs().max()) < 2e-5


def test_dinov3_pixels_of_other_modes():
    assert torch.equal(
        dinov3_pixels(random_image(20, 20, "L"), 16), dinov3_pixels(random_image(20, 20, "L").convert("RGB"), 16)
    )
