import re

import pytest

from diffsynth.runtime.request import LOOP_NAMES
from diffsynth.runtime.schema import arguments_from_json
from diffsynth.runtime.synonyms import SYNONYMS, meant, which_is_meant
from toy_pipeline import ToyPipeline, toy_pipeline


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("cfg", "cfg_scale"),
        ("guidance_scale", "cfg_scale"),  # the nearest spelling is "guidance"
        ("steps", "num_inference_steps"),
        ("sampler", "solver"),
        ("scheduler", "solver"),
        ("negative", "negative_prompt"),
        ("n", "num_images"),
        ("batch_size", "num_images"),
        ("strength", "denoising_strength"),
        ("generator", "seed"),
    ],
)
def test_a_call_and_json_say_which_name_is_meant(name, expected):
    pipe, words = toy_pipeline(), re.escape(f"unknown argument {name!r}; did you mean {expected!r}?")
    with pytest.raises(TypeError, match=words):
        pipe("abc", **{name: 1})
    with pytest.raises(TypeError, match=words):
        arguments_from_json(pipe.schema(), {name: 1})


def test_an_argument_that_json_cannot_hold():
    with pytest.raises(TypeError, match="unknown argument 'callback_on_step_end'; did you mean 'on_step'?"):
        toy_pipeline()("abc", callback_on_step_end=print)


def test_what_the_pipeline_says_has_precedence():
    class Own(ToyPipeline):
        other_arguments = {"cfg": "the toy has its own word for it"}

    pipe = toy_pipeline(Own)
    for call in (lambda: pipe("abc", cfg=2), lambda: arguments_from_json(pipe.schema(), {"cfg": 2})):
        with pytest.raises(TypeError, match="unknown argument 'cfg': the toy has its own word for it"):
            call()


def test_only_arguments_that_there_are():
    assert which_is_meant("frames", ["prompt", "num_images"]) == ""
    assert which_is_meant("frames", ["num_frames"]) == "; did you mean 'num_frames'?"
    assert which_is_meant("size", ["height", "width"]) == "; did you mean 'height' and 'width'?"
    assert which_is_meant("heigth", ["height"]) == "; did you mean 'height'?"
    assert meant("CFG-Scale", ["cfg_scale"]) == []
    assert meant("Guidance-Scale", ["cfg_scale"]) == ["cfg_scale"]


def test_no_argument_of_ours_is_a_synonym():
    """It would never be looked up."""
    assert not set(SYNONYMS) & {*LOOP_NAMES, *(name for names in SYNONYMS.values() for name in names)}
