import io
import logging

import numpy as np
import pytest
import torch
from diffusers.image_processor import VaeImageProcessor
from PIL import Image

from diffsynth.core.data.audio import Audio
from diffsynth.errors import NotFinite
from diffsynth.runtime.images import (
    check_alpha,
    check_output,
    image_to_tensor,
    images_to_batch,
    mask_to_tensor,
    tensor_to_images,
)
from tiny_z_image import SMALL, tiny_z_image


def noise(width: int, height: int) -> Image.Image:
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8))


def test_there_and_back_changes_no_level():
    image = noise(20, 12)
    tensor = image_to_tensor(image, 12, 20)
    assert tensor.shape == (1, 3, 12, 20)
    assert (tensor.min() >= -1, tensor.max() <= 1) == (True, True)
    assert np.array_equal(np.asarray(tensor_to_images(tensor)[0]), np.asarray(image))


def test_levels_are_rounded_where_diffsynth_studio_truncates():
    """Its images are darker by half a level on average, and by one level at most."""
    pixels = torch.rand(1, 3, 64, 64, generator=torch.Generator().manual_seed(0)) * 2 - 1
    exact = (pixels[0].double() + 1) * 127.5
    found = torch.from_numpy(np.asarray(tensor_to_images(pixels)[0]).copy()).permute(2, 0, 1).double()
    assert float((found - exact).abs().max()) <= 0.5 + 1e-4
    darker = found - exact.to(torch.uint8)
    assert set(darker.unique().tolist()) == {0, 1}
    assert 0.48 < float(darker.mean()) < 0.52


def test_transparency_is_a_fourth_channel_where_it_is_asked_for():
    image = noise(20, 12)
    image.putalpha(noise(20, 12).getchannel("G"))
    tensor = image_to_tensor(image, 12, 20, mode="RGBA")
    assert tensor.shape == (1, 4, 12, 20)
    (back,) = tensor_to_images(tensor)
    assert (back.mode, np.array_equal(np.asarray(back), np.asarray(image))) == ("RGBA", True)
    assert (image_to_tensor(noise(20, 12), 12, 20, mode="RGBA")[:, 3] == 1).all()
    batch = images_to_batch([image, image], height=6, width=10, mode="RGBA")
    assert batch.shape == (2, 4, 6, 10)
    assert images_to_batch(batch, height=6, width=10, mode="RGBA") is batch
    with pytest.raises(ValueError, match=r"\(2, 4, 6, 10\); expected \(b, 3, 6, 10\)"):
        images_to_batch(batch, height=6, width=10)


def test_images_without_transparency_are_refused_with_the_remedy():
    image = noise(4, 4)
    for none in ([None], image.convert("RGBA"), image.convert("LA"), []):
        check_alpha("layers", none if none != [None] else None)
    for wrong in (image, [image.convert("RGBA"), image], image.convert("L")):
        with pytest.raises(ValueError, match=r"layers has an image of mode (RGB|L), without .* image\.convert\(\"RGBA"):
            check_alpha("layers", wrong)


def test_an_empty_list_is_refused():
    with pytest.raises(ValueError, match="an empty list of images"):
        images_to_batch([], height=4, width=4)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_values_that_no_pixel_can_show(value):
    pixels = torch.zeros(1, 3, 4, 4, dtype=torch.float16)
    pixels[0, 1, 2, 3] = value
    with pytest.raises(NotFinite, match=r"decoded values hold NaN or infinity \(torch\.float16\)"):
        tensor_to_images(pixels)


@pytest.mark.parametrize("images", ["a.png", ["a.png"], [noise(4, 4), None]])
def test_what_is_no_image_is_refused(images):
    with pytest.raises(TypeError, match="an image is .*; expected a PIL image, a list of them, or a tensor"):
        images_to_batch(images, height=4, width=4)


def test_an_image_of_another_aspect_is_stretched_as_by_diffusers(caplog):
    image = noise(90, 30)
    processor = VaeImageProcessor(resample="bicubic")
    with caplog.at_level(logging.INFO, logger="diffsynth"):
        tensor = image_to_tensor(image, 16, 32)
    assert torch.allclose(tensor, processor.preprocess(image, 16, 32), atol=1e-6)
    assert "90x30 is scaled to 32x16 (stretch)" in caplog.text


def test_an_image_of_another_aspect_is_cropped_about_the_middle():
    image = Image.new("RGB", (90, 30), "black")
    image.paste("white", (30, 0, 60, 30))
    tensor = image_to_tensor(image, 16, 16, resize_mode="crop")
    assert tensor.shape == (1, 3, 16, 16)
    assert (tensor[..., 2:-2] > 0.99).all()


def test_an_image_of_another_aspect_is_padded_with_black():
    tensor = image_to_tensor(Image.new("RGB", (90, 30), "white"), 18, 18, resize_mode="pad")
    assert (tensor[..., 6:12, :] == 1).all()
    assert (tensor[..., :6, :] == -1).all()
    assert (tensor[..., 12:, :] == -1).all()
    mask = mask_to_tensor(Image.new("L", (30, 90), 255), 18, 18, resize_mode="pad")
    assert torch.equal(mask[0, 0, 0], torch.tensor([0.0] * 6 + [1.0] * 6 + [0.0] * 6))


def test_grey_and_transparent_images_become_rgb():
    for mode in ("L", "RGBA", "P"):
        assert image_to_tensor(Image.new(mode, (8, 8)), 8, 8).shape == (1, 3, 8, 8)


def test_images_mean_what_their_files_mean():
    """Below transparent pixels is white, and 16 bits of grey are scaled, not clipped."""
    hidden = Image.new("RGBA", (8, 8), (0, 255, 0, 0))
    assert (image_to_tensor(hidden, 8, 8) == 1).all()
    grey = Image.fromarray(np.full((8, 8), 128 * 257, np.uint16))
    torch.testing.assert_close(image_to_tensor(grey, 8, 8), torch.full((1, 3, 8, 8), 128 / 127.5 - 1))
    exif = Image.Exif()
    exif[0x0112] = 6
    file = io.BytesIO()
    noise(12, 8).save(file, "PNG", exif=exif)
    turned = image_to_tensor(Image.open(file), 12, 8)
    torch.testing.assert_close(turned, image_to_tensor(noise(12, 8).transpose(Image.Transpose.ROTATE_270), 12, 8))


def test_masks():
    grey = Image.fromarray(np.array([[0, 127, 128, 255]], np.uint8))
    assert mask_to_tensor(grey, 1, 4).tolist() == [[[[0, 0, 1, 1]]]]
    assert mask_to_tensor(grey.resize((8, 2), Image.Resampling.NEAREST), 1, 4).tolist() == [[[[0, 0, 1, 1]]]]
    drawn = Image.new("LA", (4, 1))
    drawn.putalpha(grey)  # black strokes on nothing
    assert mask_to_tensor(drawn, 1, 4).tolist() == [[[[0, 0, 1, 1]]]]


def test_several_images_make_a_batch():
    assert images_to_batch([noise(8, 8), noise(9, 10)], height=8, width=8).shape == (2, 3, 8, 8)


def test_a_tensor_passes_if_its_size_fits():
    tensor = torch.zeros(2, 3, 8, 16)
    assert images_to_batch(tensor, height=8, width=16) is tensor
    with pytest.raises(ValueError, match=r"\(2, 3, 8, 16\); expected \(b, 3, 16, 16\)"):
        images_to_batch(tensor, height=16, width=16)


def test_values_outside_are_clipped():
    levels = np.asarray(tensor_to_images(torch.tensor([-7.0, 7.0]).view(1, 1, 1, 2).expand(1, 3, 1, 2))[0])
    assert levels[0, :, 0].tolist() == [0, 255]


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_outputs_of_every_kind_are_checked(value):
    wrong = torch.tensor([0.0, value])
    for output in (wrong, [wrong], Audio(wrong[None], 8000), [Audio(wrong[None], 8000)]):
        with pytest.raises(NotFinite, match=r"decoded values hold NaN or infinity \(torch\.float32\)"):
            check_output(output)
    check_output([torch.zeros(2), Image.new("RGB", (8, 8)), [Image.new("RGB", (8, 8))], 0.5])
    check_output(torch.zeros(2, device="meta"))


@pytest.mark.parametrize("output_type", ["pil", "tensor"])
def test_a_call_returns_no_pixels_that_are_not_finite(output_type):
    pipe = tiny_z_image(with_autoencoder=True)
    with torch.no_grad():
        pipe.vae.decoder.conv_out.bias.fill_(float("inf"))
    with pytest.raises(NotFinite, match="decoded values hold NaN or infinity"):
        pipe("a", **{**SMALL, "output_type": output_type}, num_inference_steps=1)
