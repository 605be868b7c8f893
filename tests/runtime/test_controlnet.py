import pytest
import torch
from PIL import Image

from diffsynth.runtime.controlnet import (
    ControlNetContext,
    ControlNetContexts,
    ControlNetInput,
    active_roles,
    check_image,
    check_mask,
    config_for,
    encode_control_image,
    listed,
)
from diffsynth.runtime.feature import StepContext


def active(num_steps, **settings):
    condition = ControlNetInput(**settings)
    return [step for step in range(num_steps) if condition.is_active(step, num_steps)]


@pytest.mark.parametrize(
    ("settings", "num_steps", "expected"),
    [
        ({}, 5, [0, 1, 2, 3, 4]),
        ({"end": 0.5}, 5, [0, 1, 2]),
        ({"start": 0.5}, 5, [2, 3, 4]),
        ({"start": 0.6, "end": 0.3}, 5, [2]),
        ({"start": 0.0}, 5, [4]),
        ({}, 1, [0]),
    ],
)
def test_progress_falls_from_one_to_zero(settings, num_steps, expected):
    assert active(num_steps, **settings) == expected


def test_defaults():
    condition = ControlNetInput()
    assert (condition.controlnet_id, condition.scale, condition.start, condition.end) == (0, 1.0, 1.0, 0.0)
    assert condition.image is condition.inpaint_image is condition.inpaint_mask is condition.processor_id is None


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"start": 0.2, "end": 0.8}, "0 <= end <= start <= 1"),
        ({"start": 30}, "start=30"),
        ({"controlnet_id": -1}, "controlnet_id=-1"),
    ],
)
def test_unfit_settings(settings, message):
    with pytest.raises(ValueError, match=message):
        ControlNetInput(**settings)


def test_a_step_that_is_none():
    with pytest.raises(ValueError, match="step 5 of 5"):
        ControlNetInput().is_active(5, 5)


def test_roles_of_a_step():
    settings = [ControlNetInput(1), ControlNetInput(0, end=0.5), ControlNetInput(2, scale=0), ControlNetInput(1)]
    contexts = ControlNetContexts(tuple(ControlNetContext(torch.zeros(1, 1, 1, 1), each) for each in settings))
    first, last = (StepContext(0.5, index, 3) for index in (0, 2))
    assert active_roles("controlnet", contexts, first) == ("controlnet[1]", "controlnet[0]")
    assert active_roles("controlnet", contexts, last) == ("controlnet[1]",)
    assert active_roles("controlnet", None, first) == ()


def test_one_input_or_several():
    one = ControlNetInput()
    assert (listed(None), listed(one), listed((one, one))) == ([], [one], [one, one])


def test_the_config_that_an_input_names():
    assert config_for(ControlNetInput(1), ["a", "b"], argument="inputs") == "b"
    with pytest.raises(ValueError, match="inputs: controlnet_id=2, and 2 are loaded; expected 0 to 1"):
        config_for(ControlNetInput(2), ["a", "b"], argument="inputs")


IMAGE = Image.new("RGB", (16, 8), (255, 0, 0))
MASK = Image.new("L", (16, 8))
MASK.paste(255, (8, 0, 16, 8))


class Encoder:
    """An autoencoder whose latents are the pixels of every eighth column and row."""

    def encode(self, pixels, **tiling):
        assert tiling == {"tiled": False}
        return pixels[:, :, ::8, ::8]


def encoded(**settings):
    options = {"height": 8, "width": 16, "tiling": {"tiled": False}, "device": "cpu", "dtype": torch.float32}
    return encode_control_image(Encoder(), ControlNetInput(**settings), **options)[0, :, 0].tolist()


def test_an_encoded_control_image():
    """The part that changes is black, and the last channel is 1 where the image is kept."""
    assert encoded(image=IMAGE) == encoded(inpaint_image=IMAGE) == [[1, 1], [-1, -1], [-1, -1]]
    assert encoded(image=IMAGE, inpaint_mask=MASK) == [[1, -1], [-1, -1], [-1, -1], [1, 0]]


@pytest.mark.parametrize("images", [{}, {"image": IMAGE, "inpaint_image": IMAGE}])
def test_an_input_has_one_image(images):
    with pytest.raises(ValueError, match="inputs: an input needs one of image and inpaint_image"):
        check_image(ControlNetInput(**images), argument="inputs")


def test_a_mask_goes_with_a_controlnet_that_takes_one():
    without, with_mask = ControlNetInput(1, image=IMAGE), ControlNetInput(image=IMAGE, inpaint_mask=MASK)
    check_mask(without, inpaints=False, argument="inputs")
    check_mask(with_mask, inpaints=True, argument="inputs")
    with pytest.raises(ValueError, match="inputs: ControlNet 1 needs inpaint_mask, and none is given"):
        check_mask(without, inpaints=True, argument="inputs")
    with pytest.raises(ValueError, match="inputs: ControlNet 0 takes a control image without a mask"):
        check_mask(with_mask, inpaints=False, argument="inputs")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"controlnet_id": "0"}, "controlnet_id='0': expected an integer of at least 0"),
        ({"controlnet_id": None}, "controlnet_id=None: expected an integer"),
        ({"controlnet_id": 1.0}, "controlnet_id=1.0: expected an integer"),
        ({"scale": "0.5"}, "scale='0.5': expected a finite number"),
        ({"scale": float("nan")}, "scale=nan: expected a finite number"),
        ({"scale": [0.5, 0.8]}, "scale=.*: expected a finite number"),
        ({"start": "1"}, "start='1': expected a number from 0 to 1"),
        ({"start": None}, "start=None: expected a number"),
        ({"end": [0.0]}, "end=.*: expected a number from 0 to 1"),
        ({"end": True}, "end=True: expected a number"),
    ],
)
def test_settings_of_other_types_are_refused_when_they_are_made(settings, message):
    with pytest.raises(ValueError, match=message):
        ControlNetInput(**settings)
