"""Values of arguments against their types and ranges."""

from __future__ import annotations

import io
import threading
from collections.abc import Callable, Sequence
from typing import Annotated, Any, Literal

import numpy as np
import pytest
import torch
from jaxtyping import Float
from PIL import Image
from torch import Tensor

from diffsynth.runtime.argument_types import ArgumentType, RandDevice, argument_types, expected_text
from diffsynth.runtime.controlnet import ControlNetInput
from label_pipeline import Mood, TypedPipeline, label_pipeline

RED = Image.new("RGB", (8, 8), "red")
IMAGES = Image.Image | Sequence[Image.Image] | Tensor | None


def refusal(kind: Any, value: Any, **options: Any) -> str:
    with pytest.raises((TypeError, ValueError)) as caught:
        ArgumentType("x", kind, **options).check(value)
    return f"{caught.type.__name__}: {caught.value}"


def changed(settings, **fields):
    for name, value in fields.items():
        setattr(settings, name, value)
    return settings


@pytest.mark.parametrize(
    ("kind", "values"),
    [
        (str, ["", "a", "\U0001f600"]),
        (bool, [True, False]),
        (int, [0, -3, 10**400]),
        (float, [0.5, 2, -1e30]),
        (int | None, [None, 3]),
        (tuple[int, int], [(1, 2), [1, 2]]),
        (int | tuple[int, int], [1, (1, 2)]),
        (tuple[float, ...], [(1, 2.5), [3]]),
        (Sequence[str], [["a"], ("a", "b")]),
        (Literal["a", "b"], ["a"]),
        (Any, [object(), None]),
        (Mood | None, [Mood.CALM, None]),
        (dict[str, int], [{}, {"a": 1}]),
        (IMAGES, [RED, [RED, RED], torch.zeros(1, 3, 8, 8), None]),
        (Float[Tensor, "b c"], [torch.zeros(2, 2)]),
        (Callable[[int], None], [print, lambda step: None, lambda *steps: None, threading.Event().wait]),
        (threading.Event | None, [threading.Event()]),
        (RandDevice, ["cpu", torch.device("cpu")]),
        (Sequence[ControlNetInput], [[], [ControlNetInput(image=RED)]]),
        ("unknown", [3]),
    ],
)
def test_values_that_fit(kind, values):
    for value in values:
        ArgumentType("x", kind).check(value)


@pytest.mark.parametrize(
    ("kind", "value", "message"),
    [
        (bool, "false", "ValueError: x='false': expected True or False"),
        (bool, 1, "ValueError: x=1: expected True or False"),
        (int, True, "ValueError: x=True: expected an integer"),
        (int, 2.0, "ValueError: x=2.0: expected an integer"),
        (int, torch.ones(()), "ValueError: x=a Tensor of shape (): expected an integer"),
        (float, float("nan"), "ValueError: x=nan: expected a number"),
        (float, 10**400, "ValueError: x="),
        (float, -1e300, "ValueError: x=-1e+300: expected a number (it is beyond the range of float32)"),
        (str, "a\udcff", "ValueError: x='a\\udcff': expected text (it has a lone surrogate, U+DCFF at position 1"),
        (str | Sequence[str], ["a", 3], "expected text or a list of text (entry 1, 3, is int)"),
        (str | Sequence[str], [], "(it is empty)"),
        (tuple[int, int], (1, 2, 3), "expected a tuple (an integer, an integer)"),
        (Literal["pil", "tensor"], "tensors", "expected one of pil, tensor (did you mean 'tensor'?)"),
        (IMAGES, "a.png", "TypeError: x='a.png': expected a PIL image or a list"),
        (IMAGES, "a.png", "; open a file with PIL.Image.open(...)"),
        (Sequence[Image.Image] | Tensor, "a.mp4", "; open a file with VideoData(...)"),
        (Sequence[Image.Image] | Tensor, RED, "; pass a list of images"),
        (IMAGES, np.zeros((8, 8, 3), np.uint8), "PIL.Image.fromarray"),
        (
            IMAGES,
            range(3),
            "TypeError: x=range(0, 3): expected a PIL image or a list of a PIL image or a tensor or None (entry 0",
        ),
        (IMAGES, torch.full((1, 3, 8, 8), 255.0), "ValueError: x=a Tensor of shape (1, 3, 8, 8): expected"),
        (IMAGES, torch.zeros(1, 3, 8, 8, dtype=torch.uint8), "it is torch.uint8"),
        (IMAGES, torch.full((1, 3, 8, 8), float("nan")), "not finite"),
        (IMAGES, Image.new("RGB", (0, 4)), "it has 0x4 pixels"),
        (Callable[[int], None], lambda: None, "TypeError: x=<function"),
        (Callable[[int], None], "print", "expected a function of 1 argument"),
        (threading.Event | None, True, "TypeError: x=True: expected a threading.Event or None"),
        (RandDevice, "cuda:99", "ValueError: x='cuda:99': expected text or device (device"),
        (Annotated[int, int.__index__], "a", "expected an integer"),
        (ControlNetInput, changed(ControlNetInput(), scale=float("nan")), "scale=nan: expected a number"),
    ],
)
def test_values_that_do_not_fit(kind, value, message):
    assert message in refusal(kind, value)


def test_an_image_that_cannot_be_read_is_refused():
    file = io.BytesIO()
    Image.effect_noise((64, 64), 60).save(file, "PNG")
    truncated, closed = (Image.open(io.BytesIO(file.getvalue()[:size])) for size in (500, None))
    closed.close()
    assert "it cannot be read: image file is truncated" in refusal(IMAGES, truncated)
    assert "it cannot be read" in refusal(IMAGES, closed)
    assert "entry 1: it cannot be read" in refusal(IMAGES, [RED, closed])


def test_tensors_on_meta_are_not_read():
    ArgumentType("x", IMAGES).check(torch.zeros(1, 3, 8, 8, device="meta"))


def test_an_entry_for_each_result():
    several = ArgumentType("x", str, per_image=True)
    several.check(["a", "b"])
    with pytest.raises(ValueError, match="x=3: expected text"):
        several.check(["a", 3])


@pytest.mark.parametrize("nested", [[["a"], ["b"]], [["a", "b"]], ["a", ["b"]], (("a",),)])
def test_a_list_of_lists_is_no_entry_for_each_result(nested):
    """Z-Image once took the two texts of `[["a"], ["b"]]` for something else, and returned an image of neither."""
    several = ArgumentType("prompt", str | list[str], per_image=True)
    several.check(["a", "b"])
    with pytest.raises(ValueError, match=r"prompt=.*: expected text or a list of text \(entry"):
        several.check(nested)


def test_ranges_are_those_of_the_docstrings():
    pipe = label_pipeline(TypedPipeline)
    types = argument_types(TypedPipeline, pipe.program, pipe.__signature__, ("label",))
    assert types["label"].bounds == {"minimum": 0, "maximum": 9}
    assert types["scale"].bounds == {"exclusiveMinimum": 0}
    with pytest.raises(ValueError, match="scale=0: expected a number, above 0"):
        types["scale"].check(0)
    with pytest.raises(ValueError, match="label=12: expected"):
        types["label"].check(12)


def test_expected_texts():
    assert expected_text(int | None) == "an integer or None"
    assert expected_text(IMAGES) == "a PIL image or a list of a PIL image or a tensor or None"
    assert expected_text(RandDevice) == "text or device"
