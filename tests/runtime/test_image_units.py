"""Units of image pipelines."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from diffsynth.errors import NotFinite
from diffsynth.runtime.image_units import decode_image


class Enlarger(torch.nn.Module):
    """An autoencoder that decodes one image at a time, each latent pixel to two by two pixels."""

    def decode(self, latents, **tiling):
        assert latents.ndim == 4
        return latents.repeat_interleave(2, -1).repeat_interleave(2, -2)


@pytest.mark.parametrize(("channels", "mode"), [(3, "RGB"), (4, "RGBA")])
def test_several_images_of_a_result_are_decoded_one_by_one(channels, mode) -> None:
    latents = torch.linspace(-1, 1, 2 * channels * 3 * 4).view(2, channels, 3, 2, 2)
    images = decode_image(Enlarger(), latents=latents, tiling={}, output_type="pil")
    assert [len(layers) for layers in images] == [3, 3]
    assert {(image.mode, image.size) for layers in images for image in layers} == {(mode, (4, 4))}
    for index in range(3):
        alone = decode_image(Enlarger(), latents=latents[:, :, index], tiling={}, output_type="pil")
        assert [np.array_equal(layers[index], one) for layers, one in zip(images, alone, strict=True)] == [True] * 2
    pixels = decode_image(Enlarger(), latents=latents, tiling={}, output_type="tensor")
    assert pixels.shape == (2, channels, 3, 4, 4)
    assert torch.equal(pixels[..., ::2, ::2], latents)
    latents[1, 0, 2] = float("nan")
    with pytest.raises(NotFinite):
        decode_image(Enlarger(), latents=latents, tiling={}, output_type="pil")
