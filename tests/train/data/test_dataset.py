import dataclasses
import random

import pytest
import torch
from PIL import Image

from diffsynth.errors import TrainingError
from diffsynth_train.config import CaptionRecipe, DataRecipe
from diffsynth_train.data.dataset import Dataset, batch_indices, fill_template, vary_caption

COLUMNS = {"image": "input_image", "prompt": "prompt"}


def recipe(workspace, **captions):
    return DataRecipe(manifest=str(workspace / "metadata.csv"), height=16, width=16, captions=CaptionRecipe(**captions))


def test_every_row_once_an_epoch_in_changing_order():
    seen = [batch_indices(7, 3, step=step, seed=5) for step in range(7)]
    flat = [index for batch in seen for index in batch]
    epochs = [flat[start : start + 7] for start in (0, 7, 14)]
    assert all(sorted(epoch) == list(range(7)) for epoch in epochs)
    assert epochs[0] != epochs[1]
    assert batch_indices(7, 3, step=4, seed=5) == seen[4]


def test_a_batch_may_be_larger_than_the_set():
    assert sorted(batch_indices(3, 6, step=0, seed=0)) == [0, 0, 1, 1, 2, 2]


def test_batch_holds_call_arguments(workspace):
    values = Dataset(recipe(workspace), COLUMNS).batch([4, 0])
    assert values["prompt"] == ["grey 4", "grey 0"]
    assert values["input_image"].shape == (2, 3, 16, 16)
    assert values["input_image"][1].unique().tolist() == [-1.0]
    torch.testing.assert_close(values["input_image"][0].unique(), torch.tensor([200 / 127.5 - 1]))


def test_images_are_upright_and_over_the_background(workspace):
    exif = Image.Exif()
    exif[0x0112] = 3
    pixels = Image.new("RGBA", (16, 16), (0, 255, 0, 0))
    pixels.paste((0, 0, 0, 255), (0, 0, 16, 8))
    pixels.save(workspace / "0.png", exif=exif)
    image = Dataset(recipe(workspace), COLUMNS).batch([0])["input_image"][0]
    assert (image[:, :8].unique().tolist(), image[:, 8:].unique().tolist()) == ([1.0], [-1.0])
    over_black = dataclasses.replace(recipe(workspace), background="black")
    assert Dataset(over_black, COLUMNS).batch([0])["input_image"].unique().tolist() == [-1.0]
    with pytest.raises(TrainingError, match="background='wite': expected a colour"):
        Dataset(dataclasses.replace(over_black, background="wite"), COLUMNS)


@pytest.mark.parametrize("content", [b"<html>", b"", b"\x89PNG\r\n\x1a\n cut"])
def test_a_damaged_image_is_named(workspace, content):
    """A run of days ended in a traceback of the image library that did not say which of 10,000 files it was."""
    (workspace / "3.png").write_bytes(content)
    with pytest.raises(TrainingError, match=r"metadata.csv, row 4, column 'image': .*3.png is not an image"):
        Dataset(recipe(workspace), COLUMNS).batch([3])


def test_the_key_of_a_sample_tells_the_background(workspace):
    white, black = recipe(workspace), dataclasses.replace(recipe(workspace), background="black")
    assert Dataset(white, COLUMNS).fingerprint(0) != Dataset(black, COLUMNS).fingerprint(0)


def test_captions_vary_and_drop(workspace):
    dataset = Dataset(recipe(workspace, templates=("a {caption}",), drop=0.5), COLUMNS)
    texts = dataset.batch([1] * 200, random.Random(0))["prompt"]
    assert set(texts) == {"", "a grey 1"}
    assert 60 < texts.count("") < 140
    assert dataset.varied == {"prompt"}
    assert Dataset(recipe(workspace), COLUMNS).varied == frozenset()


def test_article():
    assert [fill_template("{article} {caption}", text) for text in ("egg", "cat")] == ["an egg", "a cat"]


def test_no_drop_keeps_every_caption():
    assert {vary_caption("x", CaptionRecipe(), random.Random(i)) for i in range(20)} == {"x"}


@pytest.mark.parametrize(
    ("captions", "message"),
    [
        ({"templates": ("{captoin}",)}, "unknown field 'captoin'; did you mean 'caption'"),
        ({"templates": ("an image",)}, "lacks {caption}"),
        ({"templates": ()}, "empty"),
        ({"drop": 1.0}, "drop = 1.0"),
    ],
)
def test_unfit_captions(workspace, captions, message):
    with pytest.raises(TrainingError, match=message):
        Dataset(recipe(workspace, **captions), COLUMNS)
