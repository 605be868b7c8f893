"""The `TypedDict` of the arguments equals the arguments of the pipeline's units."""

from __future__ import annotations

import inspect

from diffsynth_flux import Flux2ImagePipeline
from diffsynth_flux.flux2.arguments import Flux2Arguments

PARAMETERS = inspect.signature(Flux2ImagePipeline.__call__).parameters


def test_typed_dict_equals_the_signature() -> None:
    assert set(Flux2Arguments.__annotations__) == set(PARAMETERS) - {"self", "prompt"}


def test_types_equal_those_of_the_units() -> None:
    typed = {name: getattr(kind, "__forward_arg__", kind) for name, kind in Flux2Arguments.__annotations__.items()}
    assert typed == {name: PARAMETERS[name].annotation for name in typed}


def test_names_and_defaults_of_the_reference() -> None:
    """`spec/features.md` A4: names and defaults that existing scripts rely on."""
    expected = {
        "prompt": "",
        "negative_prompt": "",
        "cfg_scale": 1.0,
        "embedded_guidance": 4.0,
        "input_image": None,
        "denoising_strength": 1.0,
        "edit_image": None,
        "edit_image_auto_resize": True,
        "height": 1024,
        "width": 1024,
        "seed": None,
        "rand_device": "cpu",
        "initial_noise": None,
        "num_inference_steps": 30,
        "inpaint_mask": None,
        "inpaint_blur_size": None,
        "inpaint_blur_sigma": None,
    }
    assert {name: PARAMETERS[name].default for name in expected} == expected
    assert callable(PARAMETERS["progress_bar_cmd"].default)


def test_from_pretrained_names() -> None:
    assert list(inspect.signature(Flux2ImagePipeline.from_pretrained).parameters)[:4] == [
        "torch_dtype",
        "device",
        "model_configs",
        "vram_limit",
    ]
