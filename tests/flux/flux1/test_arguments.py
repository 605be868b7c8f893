"""The `TypedDict` of the arguments equals the arguments of the pipeline's units."""

import inspect

from diffsynth_flux import FluxImagePipeline
from diffsynth_flux.flux1.arguments import FluxArguments


def test_typed_dict_equals_the_signature():
    parameters = inspect.signature(FluxImagePipeline.__call__).parameters
    assert set(FluxArguments.__annotations__) == set(parameters) - {"self", "prompt"}


def test_types_equal_those_of_the_units():
    parameters = inspect.signature(FluxImagePipeline.__call__).parameters
    typed = {name: getattr(kind, "__forward_arg__", kind) for name, kind in FluxArguments.__annotations__.items()}
    assert typed == {name: parameters[name].annotation for name in typed}


def test_names_and_defaults_of_the_reference():
    """`spec/features.md` A4: names and defaults that existing scripts rely on."""
    parameters = inspect.signature(FluxImagePipeline.__call__).parameters
    expected = {
        "prompt": "",
        "negative_prompt": "",
        "cfg_scale": 1.0,
        "embedded_guidance": 3.5,
        "t5_sequence_length": 512,
        "input_image": None,
        "denoising_strength": 1.0,
        "height": 1024,
        "width": 1024,
        "seed": None,
        "rand_device": "cpu",
        "sigma_shift": None,
        "num_inference_steps": 30,
    }
    assert {name: parameters[name].default for name in expected} == expected
    assert callable(parameters["progress_bar_cmd"].default)


def test_from_pretrained_names():
    names = list(inspect.signature(FluxImagePipeline.from_pretrained).parameters)
    assert names[:4] == ["torch_dtype", "device", "model_configs", "vram_limit"]
    assert {"tokenizer_1", "tokenizer_2"} <= set(FluxImagePipeline.roles)
