"""Faults of velocities, steps and results, one by one."""

from dataclasses import dataclass

import pytest
import torch
from PIL import Image

from diffsynth.runtime.request import Step
from diffsynth.testing.checks.records import is_equal, result_faults, several_faults, step_faults, velocity_faults

LATENTS = torch.zeros(2, 4, 8, 6)
SIGMA = torch.tensor([0.0, 1.0])
SIZE = {"height": 8, "width": 6}
CLIP = {**SIZE, "num_frames": 3}

VELOCITIES = {
    "sigma=a tensor (1,) of float32; expected an fp32 tensor (2,)": (SIGMA[:1], LATENTS),
    "sigma=a tensor (2,) of float64; expected an fp32 tensor (2,)": (SIGMA.double(), LATENTS),
    "sigma=a float: 0.5; expected an fp32 tensor (2,)": (0.5, LATENTS),
    "sigma=[0.0, 1000.0]; expected noise levels in [0, 1]": (SIGMA * 1000, LATENTS),
    "returned a tuple: (1,) for latents (2, 4, 8, 6)": (SIGMA, (1,)),
    "returned a tensor (2, 4, 8) of float32 for latents (2, 4, 8, 6)": (SIGMA, LATENTS[..., 0]),
    "returned NaN or infinity": (SIGMA, LATENTS + float("inf")),
}


def test_a_correct_velocity():
    assert list(velocity_faults(LATENTS, SIGMA, LATENTS.bfloat16())) == []


@pytest.mark.parametrize("message", VELOCITIES)
def test_wrong_velocities(message):
    (fault,) = velocity_faults(LATENTS, *VELOCITIES[message])
    assert message in fault


def steps(*levels, latents=LATENTS):
    return [Step(index, len(levels) - 1, levels[index], levels[index + 1], latents) for index in range(len(levels) - 1)]


APART = [*steps(1.0, 0.5), *steps(0.4, 0.0)]
STEPS = {
    "num_inference_steps=2 gave 0 steps": [],
    "num_inference_steps=2 gave 1 steps": steps(1.0, 0.0),
    "the steps start at noise levels [1.0, 0.4] and end at [0.5, 0.0]": APART,
    "starts at noise level 1.5; expected a level in (0, 1]": steps(1.5, 0.5, 0.0),
    "noise levels are [1.0, 1.0, 0.0]; expected each to be below": steps(1.0, 1.0, 0.0),
    "ends at noise level 0.1; expected exactly 0": steps(1.0, 0.5, 0.1),
    "after step 1 the latents are a tensor (2, 4, 8, 6) of bfloat16": [
        steps(1.0, 0.5, 0.0)[0], steps(1.0, 0.5, 0.0, latents=LATENTS.bfloat16())[1],
    ],
    "after step 1 the latents have NaN or infinity": [
        steps(1.0, 0.5, 0.0)[0], steps(1.0, 0.5, 0.0, latents=LATENTS + float("nan"))[1],
    ],
}  # fmt: skip


def test_correct_steps():
    assert list(step_faults(steps(1.0, 0.5, 0.0), num_steps=2, batch=2)) == []


@pytest.mark.parametrize("message", STEPS)
def test_wrong_steps(message):
    (fault,) = step_faults(STEPS[message], num_steps=2, batch=2)
    assert message in fault


def test_another_batch_is_a_fault_of_each_step():
    assert len(list(step_faults(steps(1.0, 0.5, 0.0), num_steps=2, batch=3))) == 2


TENSORS = {
    "returned a list of 2; expected a tensor b c h w": ([1, 2], SIZE),
    "returned a tensor (3, 8, 6) of float32; expected a tensor b c h w": (torch.zeros(3, 8, 6), SIZE),
    "returned 2 results; expected 1": (torch.zeros(2, 3, 8, 6), SIZE),
    "asked for height=8, width=6, got height=6, width=8": (torch.zeros(1, 3, 6, 8), SIZE),
    "asked for height=8, width=6, num_frames=3, got height=8, width=6, num_frames=2": (
        torch.zeros(1, 3, 2, 8, 6), CLIP,
    ),
    "the result has NaN or infinity": (torch.full((1, 3, 8, 6), float("nan")), SIZE),
}  # fmt: skip


def kind_of(size):
    return "video" if "num_frames" in size else "image"


@pytest.mark.parametrize(("tensor", "size"), [(torch.zeros(1, 3, 8, 6), SIZE), (torch.zeros(1, 4, 2, 8, 6), SIZE),
                                              (torch.zeros(1, 4, 3, 8, 6), CLIP)])  # fmt: skip
def test_correct_tensors(tensor, size):
    assert list(result_faults(tensor, size, kind=kind_of(size))) == []


@pytest.mark.parametrize("message", TENSORS)
def test_wrong_tensors(message):
    tensor, size = TENSORS[message]
    (fault,) = result_faults(tensor, size, kind=kind_of(size))
    assert message in fault


@dataclass
class Sound:
    samples: torch.Tensor
    rate: int = 8000


def test_results_of_another_kind_are_there_and_finite():
    assert list(result_faults(Sound(torch.zeros(2, 9)), {}, kind="audio")) == []
    assert list(result_faults("a cat", {}, kind="text")) == []
    assert list(result_faults(None, {}, kind="text")) == ["the result is None"]
    assert list(result_faults([Sound(torch.full((2, 9), float("nan")))], {}, kind="audio")) == [
        "the result has NaN or infinity"
    ]
    assert list(several_faults([Sound(torch.zeros(1)), 3], {}, kind="audio", batch=2)) == []


def test_results_are_equal_to_the_bit():
    one, other = torch.zeros(2), torch.tensor([0.0, 1e-30])
    for make in (lambda x: x, lambda x: [x, 3], Sound, lambda x: ("a", {"b": 2}, x.numpy())):
        assert is_equal(make(one), make(one.clone()))
        assert not is_equal(make(one), make(other))
    assert not is_equal(one, [one])
    assert is_equal(IMAGE, IMAGE.copy())
    assert not is_equal(IMAGE, TURNED)


IMAGE, TURNED = Image.new("RGB", (6, 8)), Image.new("RGB", (8, 6))
IMAGES = {
    "returned a Image: ": (IMAGE, SIZE),
    "returned a list of 1 for num_images=2; expected a list of 2": ([IMAGE], SIZE),
    "returned a list of a list of 3; expected PIL images or lists of them": ([["a"] * 3] * 2, SIZE),
    "returned a list of a Image: ": ([IMAGE] * 2, CLIP),
    "asked for height=8, width=6, got height=6, width=8": ([IMAGE, TURNED], SIZE),
    "the images of one video have the sizes [(6, 8), (8, 6)]; expected one size": (
        [[IMAGE] * 3, [IMAGE, TURNED, IMAGE]], CLIP,
    ),
    "got height=8, width=6, num_frames=2": ([[IMAGE] * 3, [IMAGE] * 2], CLIP),
}  # fmt: skip


@pytest.mark.parametrize(
    ("images", "size"), [([IMAGE, IMAGE], SIZE), ([[IMAGE] * 3] * 2, SIZE), ([[IMAGE] * 3] * 2, CLIP)]
)
def test_correct_images(images, size):
    assert list(several_faults(images, size, kind=kind_of(size), batch=2)) == []


@pytest.mark.parametrize("message", IMAGES)
def test_wrong_images(message):
    images, size = IMAGES[message]
    (fault,) = several_faults(images, size, kind=kind_of(size), batch=2)
    assert message in fault
