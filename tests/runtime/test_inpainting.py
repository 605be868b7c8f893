"""Inpainting: the velocity outside of the mask, the mask, and calls that are refused."""

from __future__ import annotations

import pytest
import torch
from PIL import Image

from diffsynth.runtime.inpainting import Inpainting, check, check_masks, gaussian_blur, prepare_inpainting, toward_input

IMAGE = Image.new("RGB", (64, 32))
CALL = {"inpaint_mask": None, "inpaint_blur_size": None, "inpaint_blur_sigma": None, "input_image": IMAGE}
CALL["resize_mode"] = "stretch"


def half_mask() -> Image.Image:
    mask = Image.new("L", (64, 32))
    mask.paste(255, (0, 0, 24, 32))
    return mask


def inpainting(**arguments) -> Inpainting:
    latents = torch.randn(2, 4, 4, 8, generator=torch.Generator().manual_seed(0))
    call = {"inpaint_mask": half_mask(), "height": 32, "width": 64, "device": torch.device("cpu")}
    return prepare_inpainting(input_latents=latents, **call | arguments)


def test_kept_latents_come_back_and_others_follow_the_network() -> None:
    region = inpainting()
    x0, noise = region.input_latents, torch.randn(2, 4, 4, 8, generator=torch.Generator().manual_seed(1))
    x, velocity = noise, torch.ones(2, 4, 4, 8)
    for sigma, sigma_next in ((1.0, 0.7), (0.7, 0.2), (0.2, 0.0)):
        v = toward_input(velocity, x, torch.tensor([sigma, sigma]), region)
        x = x + (sigma_next - sigma) * v
        kept = (1 - sigma_next) * x0 + sigma_next * noise
        assert torch.allclose(x[..., 3:], kept[..., 3:], atol=1e-5)
    assert torch.allclose(x[..., :3], (noise - 1)[..., :3], atol=1e-5)


def test_a_white_mask_changes_nothing_to_the_bit() -> None:
    region = inpainting(inpaint_mask=Image.new("L", (64, 32), 255))
    velocity = torch.randn(2, 4, 4, 8)
    assert torch.equal(toward_input(velocity, torch.randn(2, 4, 4, 8), torch.tensor([0.5, 0.5]), region), velocity)
    assert toward_input(velocity, velocity, torch.tensor([0.5]), None) is velocity


def test_the_mask_is_the_mean_over_a_latent_pixel() -> None:
    mask = Image.new("L", (64, 32))
    mask.paste(255, (0, 0, 20, 32))
    region = inpainting(inpaint_mask=mask)
    assert region.mask.shape == (1, 1, 4, 8)
    assert region.mask[0, 0, 0].tolist() == [1, 1, 0.5, 0, 0, 0, 0, 0]


def test_a_mask_of_another_size_is_scaled_as_the_image_is() -> None:
    region = inpainting(inpaint_mask=half_mask().resize((128, 64)))
    assert torch.allclose(region.mask, inpainting().mask, atol=0.2)


def test_a_mask_in_the_alpha_channel_is_read() -> None:
    drawn = Image.new("RGBA", (64, 32), "black")
    drawn.putalpha(half_mask())
    assert torch.equal(inpainting(inpaint_mask=drawn).mask, inpainting().mask)


def test_a_mask_for_each_result() -> None:
    region = inpainting(inpaint_mask=[half_mask(), Image.new("L", (64, 32))])
    assert region.mask.mean(dim=(1, 2, 3)).tolist() == [3 / 8, 0]
    with pytest.raises(ValueError, match="inpaint_mask has 3 images; expected 1 or 2"):
        check_masks({"inpaint_mask": [half_mask()] * 3, "batch_size": 2})


def test_a_blurred_mask_has_a_soft_edge() -> None:
    sharp, soft = inpainting().mask[0, 0, 0], inpainting(inpaint_blur_size=2, inpaint_blur_sigma=1.0).mask[0, 0, 0]
    assert sharp.tolist() == [1, 1, 1, 0, 0, 0, 0, 0]
    assert (soft[:-1] >= soft[1:]).all()
    assert 0.5 < float(soft[2]) < 1
    assert 0 < float(soft[3]) < 0.5
    weights = torch.exp(-0.5 * torch.arange(-2, 3).float() ** 2)
    assert float(soft[3]) == pytest.approx(float(weights[:2].sum() / weights.sum()))


def test_blurring_keeps_constant_images() -> None:
    image = torch.full((1, 2, 5, 3), 0.7)
    assert torch.allclose(gaussian_blur(image, radius=4, sigma=2.0), image)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"inpaint_mask": IMAGE, "input_image": None}, "without input_image; pass the image to inpaint"),
        ({"inpaint_mask": IMAGE, "inpaint_blur_size": 2}, "inpaint_blur_sigma=None: expected both"),
        ({"inpaint_blur_size": 2, "inpaint_blur_sigma": 1.0}, "without inpaint_mask"),
    ],
)
def test_bad_arguments(arguments, message) -> None:
    with pytest.raises(ValueError, match=message):
        check({}, CALL | arguments)


def test_a_mask_of_another_shape_is_said(caplog) -> None:
    """A square mask for a wide photo: cropped to the result, the mask lies beside what it was drawn on."""
    cropped = CALL | {"resize_mode": "crop"}
    check({}, cropped | {"inpaint_mask": IMAGE.resize((128, 64))})
    assert not caplog.records
    check({}, cropped | {"inpaint_mask": Image.new("L", (64, 64))})
    assert "input_image is 64x32 and inpaint_mask 64x64" in caplog.text
    caplog.clear()
    turned = Image.new("RGB", (32, 64))
    turned.getexif()[0x0112] = 6
    check({}, cropped | {"input_image": turned, "inpaint_mask": IMAGE})
    check({}, CALL | {"inpaint_mask": Image.new("L", (64, 64))})
    assert not caplog.records
