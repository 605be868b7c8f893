"""The image and the clip for calls of tiny models."""

from PIL import ImageChops

from diffsynth.testing import tiny_clip, tiny_image

SIZE = {"height": 32, "width": 64, "num_frames": 5}


def test_an_image_has_its_size_and_no_symmetry():
    image = tiny_image(SIZE)
    assert (image.mode, image.size) == ("RGB", (64, 32))
    assert image.getpixel((0, 0)) != image.getpixel((63, 0)) != image.getpixel((0, 31))
    assert len(image.getcolors(32 * 64)) > 1000


def test_the_frames_of_a_clip_differ():
    clip = tiny_clip(SIZE)
    assert [frame.size for frame in clip] == [(64, 32)] * 5
    assert all(ImageChops.difference(clip[0], frame).getbbox() is not None for frame in clip[1:])
    assert ImageChops.difference(clip[2], tiny_image(SIZE, turn=2)).getbbox() is None
