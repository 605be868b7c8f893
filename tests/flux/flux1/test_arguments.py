"""The `TypedDict` of the arguments equals the arguments of the pipeline's units."""

import inspect
import json
from dataclasses import replace
from pathlib import Path

import pytest

import diffsynth
from diffsynth_flux import FluxImagePipeline
from diffsynth_flux.flux1.arguments import OTHER_ARGUMENTS, FluxArguments
from flux1_oracles import DIT, tiny_pipelines


def test_typed_dict_equals_the_signature():
    parameters = inspect.signature(FluxImagePipeline.__call__).parameters
    assert set(FluxArguments.__annotations__) == set(parameters) - {"self", "prompt"}


def test_types_equal_those_of_the_units():
    parameters = inspect.signature(FluxImagePipeline.__call__).parameters
    typed = {name: getattr(kind, "__forward_arg__", kind) for name, kind in FluxArguments.__annotations__.items()}
    assert typed == {name: parameters[name].annotation for name in typed}


TABLE = json.loads((Path(__file__).parents[2] / "data" / "arguments" / "flux.json").read_text(encoding="utf-8"))
"""Pipeline -> argument of DiffSynth-Studio (`spec/features.md`, A4) -> its default."""

OURS = {"tiled": None, "tile_size": 64, "tile_stride": 48}
"""Defaults that differ: a tile of 128 latent pixels is all of an image of 1024 pixels, and would save no memory; None
uses tiles where the plan for a `vram_limit` needs them."""


def test_every_argument_of_diffsynth_studio_is_taken_or_says_what_takes_its_place():
    parameters = inspect.signature(FluxImagePipeline.__call__).parameters
    taken = {name: default for name, default in TABLE["flux1"].items() if name in parameters}
    found = {name: parameters[name].default for name in taken}
    assert callable(found.pop("progress_bar_cmd"))
    assert found == {name: OURS.get(name, default) for name, default in taken.items() if name in found}
    others = set(TABLE["flux1"]) - set(taken)
    assert others == set(OTHER_ARGUMENTS) - {"guidance_scale"}
    pipe = tiny_pipelines()[0]
    with pytest.raises(
        TypeError, match="unknown argument 'guidance_scale': embedded_guidance is the scale that a dist"
    ):
        pipe.check(prompt="a", guidance_scale=3.5)
    for name in others:
        with pytest.raises(TypeError, match=f"unknown argument '{name}': (this version recognises|step_cache='tea:)"):
            pipe.check(prompt="a", **{name: TABLE["flux1"][name]})


def test_defaults_of_schnell():
    """The levels of its four steps follow from its network, which takes no guidance."""
    defaults = diffsynth.registry.get("flux.1-schnell").defaults
    assert dict(defaults) == {"num_inference_steps": 4, "t5_sequence_length": 256}
    ours, _ = tiny_pipelines(replace(DIT, guidance_embed=False))
    steps = []
    ours("a", **defaults, height=32, width=32, on_step=lambda step: steps.append((step.sigma, step.sigma_next)))
    assert steps == [(1.0, 0.75), (0.75, 0.5), (0.5, 0.25), (0.25, 0.0)]


def test_what_schnell_does_not_read_of_a_prompt_is_logged(caplog):
    ours, _ = tiny_pipelines(replace(DIT, guidance_embed=False))
    call = {"height": 32, "width": 32, "num_inference_steps": 1, "t5_sequence_length": 256}
    ours("x" * 300 + "THE END", **call)
    (text,) = [text for text in caplog.messages if text.startswith("T5 takes t5_sequence_length=256 tokens")]
    assert text.endswith("THE END'")


def test_from_pretrained_names():
    names = list(inspect.signature(FluxImagePipeline.from_pretrained).parameters)
    assert names[:4] == ["torch_dtype", "device", "model_configs", "vram_limit"]
    assert {"tokenizer_1", "tokenizer_2"} <= set(FluxImagePipeline.roles)
