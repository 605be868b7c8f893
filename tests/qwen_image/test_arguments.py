"""The `TypedDict` of the arguments equals the arguments of the pipeline's units."""

from __future__ import annotations

import inspect

from diffsynth_qwen_image import QwenImagePipeline
from diffsynth_qwen_image.arguments import QwenImageArguments

PARAMETERS = inspect.signature(QwenImagePipeline.__call__).parameters


def test_typed_dict_equals_the_signature() -> None:
    assert set(QwenImageArguments.__annotations__) == set(PARAMETERS) - {"self", "prompt"}


def test_types_equal_those_of_the_units() -> None:
    typed = {name: getattr(kind, "__forward_arg__", kind) for name, kind in QwenImageArguments.__annotations__.items()}
    assert typed == {name: PARAMETERS[name].annotation for name in typed}


def test_names_and_defaults_of_the_reference() -> None:
    """`spec/features.md` A4: names and defaults that existing scripts rely on."""
    expected = {
        "prompt": "",
        "negative_prompt": "",
        "cfg_scale": 4.0,
        "input_image": None,
        "denoising_strength": 1.0,
        "edit_image": None,
        "edit_image_auto_resize": True,
        "edit_rope_interpolation": False,
        "zero_cond_t": False,
        "inpaint_mask": None,
        "inpaint_blur_size": None,
        "inpaint_blur_sigma": None,
        "height": 1328,
        "width": 1328,
        "seed": None,
        "rand_device": "cpu",
        "num_inference_steps": 30,
        "exponential_shift_mu": None,
    }
    assert {name: PARAMETERS[name].default for name in expected} == expected
    assert callable(PARAMETERS["progress_bar_cmd"].default)
