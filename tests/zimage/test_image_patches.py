"""Patches that SigLIP 2 reads equal those of transformers' processors."""

from __future__ import annotations

import pytest

from diffsynth_zimage.config import TINY_SIGLIP2, Siglip2ImageEncoderConfig
from diffsynth_zimage.image_patches import siglip2_grid, siglip2_patches
from siglip_oracles import SIZES, photo, siglip2_processed


@pytest.mark.parametrize("size", SIZES)
def test_patches_equal_those_of_the_processor(size: tuple[int, int]) -> None:
    image = photo(*size)
    inputs, ours = siglip2_processed(image), siglip2_patches(image, TINY_SIGLIP2)
    rows, columns = inputs["spatial_shapes"][0].tolist()
    assert tuple(ours.shape[1:3]) == (rows, columns) == siglip2_grid(image.height, image.width, TINY_SIGLIP2)
    expected = inputs["pixel_values"][:, : rows * columns].view_as(ours)
    assert (ours - expected).abs().max() < 1e-5


@pytest.mark.parametrize("size", SIZES)
def test_patches_equal_those_of_torchvision(size: tuple[int, int]) -> None:
    """The grid is the same; torchvision scales levels with other rounding, by up to one of 255."""
    pytest.importorskip("torchvision", reason="transformers' image processor of SigLIP 2 needs torchvision")
    from transformers import Siglip2ImageProcessor

    image, config = photo(*size), Siglip2ImageEncoderConfig()
    processor = Siglip2ImageProcessor(patch_size=config.patch_size, max_num_patches=config.max_patches)
    inputs, ours = processor(images=[image], return_tensors="pt"), siglip2_patches(image, config)
    rows, columns = inputs["spatial_shapes"][0].tolist()
    assert tuple(ours.shape[1:3]) == (rows, columns)
    assert (ours - inputs["pixel_values"][:, : rows * columns].view_as(ours)).abs().max() < 2.1 / 255


def test_the_published_grid() -> None:
    config = Siglip2ImageEncoderConfig()
    assert siglip2_grid(1024, 1024, config) == (16, 16)
    assert siglip2_grid(768, 1344, config) == (12, 21)
