"""The `TypedDict` of the arguments equals the arguments of the pipeline's units."""

from __future__ import annotations

import inspect
import json
from pathlib import Path

import pytest

from diffsynth_flux import Flux2ImagePipeline
from diffsynth_flux.flux2.arguments import Flux2Arguments
from flux2_oracles import tiny_pipelines

PARAMETERS = inspect.signature(Flux2ImagePipeline.__call__).parameters


def test_typed_dict_equals_the_signature() -> None:
    assert set(Flux2Arguments.__annotations__) == set(PARAMETERS) - {"self", "prompt"}


def test_types_equal_those_of_the_units() -> None:
    typed = {name: getattr(kind, "__forward_arg__", kind) for name, kind in Flux2Arguments.__annotations__.items()}
    assert typed == {name: PARAMETERS[name].annotation for name in typed}


def test_every_argument_of_diffsynth_studio_is_taken() -> None:
    file = Path(__file__).parents[2] / "data" / "arguments" / "flux.json"
    table = json.loads(file.read_text(encoding="utf-8"))["flux2"]
    found = {name: PARAMETERS[name].default for name in table}
    assert callable(found.pop("progress_bar_cmd"))
    assert found == {name: default for name, default in table.items() if name in found}


@pytest.mark.parametrize(
    "name", ["t5_sequence_length", "template_inputs", "negative_template_inputs", "guidance_scale"]
)
def test_an_argument_that_is_not_taken_says_what_takes_its_place(name) -> None:
    with pytest.raises(
        TypeError, match=f"unknown argument '{name}': (FLUX.2 has no T5|template models|embedded_guidance is)"
    ):
        tiny_pipelines(klein=True)[0].check(prompt="a", **{name: None})


def test_from_pretrained_names() -> None:
    assert list(inspect.signature(Flux2ImagePipeline.from_pretrained).parameters)[:4] == [
        "torch_dtype",
        "device",
        "model_configs",
        "vram_limit",
    ]
