"""SigLIP 2's image encoder equals transformers'."""

from __future__ import annotations

import pytest
import torch
from PIL import Image
from transformers import Siglip2VisionModel

from diffsynth_zimage.config import TINY_SIGLIP2, Siglip2ImageEncoderConfig
from diffsynth_zimage.image_encoders import Siglip2ImageEncoder
from diffsynth_zimage.image_patches import siglip2_patches
from parity import TOLERANCE, neutral_parameters, relative_error
from siglip_oracles import SIZES, photo, siglip2_oracle, siglip2_processed


@pytest.fixture(scope="module")
def pair() -> tuple[Siglip2ImageEncoder, Siglip2VisionModel]:
    oracle = siglip2_oracle(TINY_SIGLIP2)
    ours = Siglip2ImageEncoder(TINY_SIGLIP2).eval()
    ours.load_state_dict({f"vision_model.{name}": weight for name, weight in oracle.named_parameters()})
    return ours, oracle


def run_oracle(oracle: Siglip2VisionModel, image: Image.Image) -> torch.Tensor:
    inputs = siglip2_processed(image)
    rows, columns = inputs["spatial_shapes"][0].tolist()
    return oracle(**inputs).last_hidden_state[:, : rows * columns].view(1, rows, columns, -1)


@pytest.mark.parametrize("size", SIZES)
@torch.no_grad()
def test_equals_transformers(pair, size: tuple[int, int]) -> None:
    ours, oracle = pair
    image = photo(*size)
    assert relative_error(ours(siglip2_patches(image, TINY_SIGLIP2)), run_oracle(oracle, image)) < TOLERANCE


def test_every_parameter_matters(pair) -> None:
    keys = [name for name, _ in pair[1].named_parameters() if name.endswith("k_proj.bias")]  # adds the same to all
    assert neutral_parameters(pair[1], lambda: run_oracle(pair[1], photo(176, 208)), skip=keys) == []


def test_positions_must_be_square() -> None:
    with pytest.raises(ValueError, match="num_positions=200: expected a square number"):
        Siglip2ImageEncoderConfig(num_positions=200)
