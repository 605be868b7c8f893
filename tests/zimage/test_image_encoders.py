"""SigLIP 2's image encoder and its preprocessing equal transformers'."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import Siglip2VisionModel
from transformers.models.siglip2.image_processing_pil_siglip2 import Siglip2ImageProcessorPil

from diffsynth_zimage.config import TINY_SIGLIP2, Siglip2ImageEncoderConfig
from diffsynth_zimage.image_encoders import Siglip2ImageEncoder, siglip2_grid, siglip2_patches
from parity import TOLERANCE, neutral_parameters, relative_error
from siglip_oracles import siglip2_oracle

SIZES = [(64, 64), (176, 208), (300, 50), (1000, 37), (16, 16)]


def photo(width: int, height: int) -> Image.Image:
    pixels = np.random.default_rng(width).integers(0, 255, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


@pytest.fixture(scope="module")
def pair() -> tuple[Siglip2ImageEncoder, Siglip2VisionModel]:
    oracle = siglip2_oracle(TINY_SIGLIP2)
    ours = Siglip2ImageEncoder(TINY_SIGLIP2).eval()
    ours.load_state_dict({f"vision_model.{name}": weight for name, weight in oracle.named_parameters()})
    return ours, oracle


def run_oracle(oracle: Siglip2VisionModel, image: Image.Image) -> torch.Tensor:
    inputs = processed(image)
    rows, columns = inputs["spatial_shapes"][0].tolist()
    return oracle(**inputs).last_hidden_state[:, : rows * columns].view(1, rows, columns, -1)


def processed(image: Image.Image) -> dict[str, torch.Tensor]:
    processor = Siglip2ImageProcessorPil(
        patch_size=TINY_SIGLIP2.patch_size, max_num_patches=TINY_SIGLIP2.max_patches, do_convert_rgb=True
    )
    return dict(processor(images=[image], return_tensors="pt"))


@pytest.mark.parametrize("size", SIZES)
@torch.no_grad()
def test_equals_transformers(pair, size: tuple[int, int]) -> None:
    ours, oracle = pair
    image = photo(*size)
    assert relative_error(ours(siglip2_patches(image, TINY_SIGLIP2)), run_oracle(oracle, image)) < TOLERANCE


def test_every_parameter_matters(pair) -> None:
    keys = [name for name, _ in pair[1].named_parameters() if name.endswith("k_proj.bias")]  # adds the same to all
    assert neutral_parameters(pair[1], lambda: run_oracle(pair[1], photo(176, 208)), skip=keys) == []


@pytest.mark.parametrize("size", SIZES)
def test_patches_equal_those_of_the_processor(size: tuple[int, int]) -> None:
    image = photo(*size)
    inputs, ours = processed(image), siglip2_patches(image, TINY_SIGLIP2)
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


def test_positions_must_be_square() -> None:
    with pytest.raises(ValueError, match="num_positions=200: expected a square number"):
        Siglip2ImageEncoderConfig(num_positions=200)
