"""The schema of a call is complete, agrees with the arguments that the call accepts, and needs nothing loaded."""

from __future__ import annotations

import base64
import enum
import inspect
import io
import json
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import pytest
import torch
from click.testing import CliRunner
from jaxtyping import Float
from PIL import Image
from torch import Tensor

import diffsynth
from diffsynth import _discovery
from diffsynth.cli.group import program
from diffsynth.errors import UnknownModel
from diffsynth.runtime.controlnet import ControlNetInput
from diffsynth.runtime.schema import HOST_ONLY, arguments_from_json, model_schema
from diffsynth.runtime.schema.annotations import schema_of
from diffsynth.runtime.schema.documentation import with_range
from diffsynth.runtime.unit import unit
from diffsynth.spec import resolve
from toy_pipeline import ToyPipeline, toy_pipeline

MODELS = sorted(one.spec.name for one in _discovery.catalog().models if one.distribution.startswith("diffsynth-"))
IMAGE = {"type": "string", "contentEncoding": "base64", "contentMediaType": "image/png", "x-diffsynth-type": "image"}


def in_json(value):
    """A value as it comes back from JSON, where a tuple is a list."""
    return json.loads(json.dumps(value))


class Mood(enum.Enum):
    CALM = "calm"
    WILD = "wild"


@dataclass
class Spot:
    """A position and its description."""

    x: float
    words: tuple[str, int] = ("here", 1)
    image: Image.Image | None = None
    draw: Callable[[], None] | None = None

    def __post_init__(self):
        if self.x < 0:
            raise ValueError(f"x={self.x}: expected 0 or more")


@unit("spots")
def place_spots(*, spots: list[Spot] | None = None, mood: Mood | None = None, unseen: "NotThere | None" = None):
    """Place spots.

    Args:
        spots: places, in order;
            the first is drawn first.
    """
    return spots


class SpottedPipeline(ToyPipeline):
    units = (*ToyPipeline.units, place_spots)


def png(image) -> str:
    buffer = io.BytesIO()
    image.save(buffer, format="PNG")
    return base64.b64encode(buffer.getvalue()).decode()


@pytest.mark.parametrize("name", MODELS)
def test_every_argument_of_every_model_is_there_or_host_only(name):
    schema = model_schema(name)
    record = diffsynth.registry.get(name)
    signature = resolve(record.pipeline).call_signature(record.defaults)
    assert not set(schema["properties"]) & set(schema[HOST_ONLY])
    assert {*schema["properties"], *schema[HOST_ONLY]} == set(signature.parameters)
    assert {"on_step", "cancel", "progress_bar_cmd"} <= set(schema[HOST_ONLY])
    for argument, described in schema["properties"].items():
        assert described["default"] == in_json(signature.parameters[argument].default)
        assert described["description"], f"document {argument} in an Args: section of the family's arguments.py"
        check_schema(described)
    assert all(schema[HOST_ONLY].values())
    assert json.loads(json.dumps(schema, allow_nan=False)) == schema


@pytest.mark.parametrize("name", MODELS)
def test_the_defaults_of_a_model_are_arguments_by_its_schema(name):
    schema = model_schema(name)
    defaults = {argument: described["default"] for argument, described in schema["properties"].items()}
    assert in_json(arguments_from_json(schema, defaults)) == defaults


def check_schema(schema):
    """The part of the draft that we use."""
    kinds = {"string", "integer", "number", "boolean", "null", "array", "object"}
    known = {"description", "type", "default", "anyOf", "enum", "items", "prefixItems", "minItems", "maxItems"}
    known |= {"minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum", "contentEncoding", "contentMediaType"}
    known |= {"properties", "required", "additionalProperties"}
    assert {keyword for keyword in schema if not keyword.startswith("x-diffsynth-")} <= known
    assert schema.get("type", "null") in kinds
    inner = [*schema.get("anyOf", ()), *schema.get("prefixItems", ()), *schema.get("properties", {}).values()]
    for one in (*inner, *([schema["items"]] if "items" in schema else [])):
        check_schema(one)


@pytest.mark.parametrize("name", [name for name in MODELS if diffsynth.registry.get(name).weights == "present"])
def test_a_bound_in_the_schema_is_one_of_the_pipeline(name):
    """A value outside of a documented range is refused by the units, too."""
    pipe = diffsynth.load(name, device="cpu")
    schema, tried = pipe.schema(), 0
    usual = {"height": 32, "width": 32, "num_inference_steps": 1, "cfg_scale": 1.0}
    usual["input_image"] = Image.new("RGB", (32, 32))
    for argument, described in schema["properties"].items():
        for one in described.get("anyOf", [described]):
            outside = [one[key] - step for key, step in (("minimum", 1), ("exclusiveMinimum", 0)) if key in one]
            outside += [one[key] + step for key, step in (("maximum", 0.01), ("exclusiveMaximum", 0)) if key in one]
            for value in outside:
                tried += 1
                with pytest.raises(ValueError, match=r"\w"):
                    pipe(**{**usual, argument: value})
                with pytest.raises(ValueError, match=argument):
                    arguments_from_json(schema, {argument: value})
    assert tried >= 6


def test_of_a_class_and_of_an_instance():
    of_class, of_instance = ToyPipeline.schema(), toy_pipeline().named("toy-1", {"height": 16}).schema()
    assert (of_class["title"], of_instance["title"]) == ("ToyPipeline", "toy-1")
    assert (of_class["properties"]["height"]["default"], of_instance["properties"]["height"]["default"]) == (32, 16)
    assert of_class["properties"].keys() == of_instance["properties"].keys()
    assert of_class["description"] == "Generates grey images whose level is a tenth of the prompt's length."
    assert of_class["x-diffsynth-pipeline"] == "toy_pipeline:ToyPipeline"
    assert of_class["required"] == []


def test_of_a_model_by_name_nothing_is_loaded(monkeypatch):
    monkeypatch.setenv("DIFFSYNTH_MODEL_BASE_PATH", "/nowhere")
    monkeypatch.setattr("diffsynth.runtime.pretrained.read_config", None)
    schema = model_schema("TONGYI-mai/z-image")
    assert (schema["title"], schema["properties"]["num_inference_steps"]["default"]) == ("z-image", 50)
    with pytest.raises(UnknownModel, match="did you mean 'z-image'"):
        model_schema("z-imag")


def test_a_unit_that_is_added_brings_its_argument_and_its_words():
    schema = SpottedPipeline.schema()
    assert schema["properties"]["spots"]["description"] == "places, in order; the first is drawn first."
    assert schema["properties"]["mood"]["anyOf"][0]["enum"] == ["calm", "wild"]
    assert schema[HOST_ONLY]["unseen"] == ""


@pytest.mark.parametrize(
    ("kind", "expected"),
    [
        (str, {"type": "string"}),
        (int | None, {"anyOf": [{"type": "integer"}, {"type": "null"}]}),
        (bool, {"type": "boolean"}),
        (Sequence[float], {"type": "array", "items": {"type": "number"}}),
        (Mapping[str, int], {"type": "object", "additionalProperties": {"type": "integer"}}),
        (Literal["a", "b"], {"enum": ["a", "b"]}),
        (tuple[int, str], {"type": "array", "prefixItems": [{"type": "integer"}, {"type": "string"}]}),
        (tuple[int, ...], {"type": "array", "items": {"type": "integer"}}),
        (Image.Image, IMAGE),
        (Image.Image | Tensor, {**IMAGE, "x-diffsynth-host-types": ["Tensor"]}),
        (Any, {}),
        (Tensor, None),
        (Float[Tensor, "b c"] | None, None),
        (Callable[[int], None] | None, None),
        (threading.Event, None),
        (list[threading.Event], None),
        (torch.dtype, None),
    ],
)
def test_types(kind, expected):
    found = schema_of(kind)
    if isinstance(found, dict):
        found = {key: value for key, value in found.items() if key not in ("minItems", "maxItems")}
    assert found == expected


@pytest.mark.parametrize(
    ("text", "bounds"),
    [
        ("pixels, at least 1; rounded", {"minimum": 1}),
        ("in (0, 1]; how far", {"exclusiveMinimum": 0, "maximum": 1}),
        ("in [-1, 0.5)", {"minimum": -1, "exclusiveMaximum": 0.5}),
        ("above 0, at most 2.5", {"exclusiveMinimum": 0, "maximum": 2.5}),
        ("as it likes", {}),
    ],
)
def test_ranges_are_read_from_words(text, bounds):
    assert with_range({"type": "number"}, text) == {"type": "number", **bounds}
    assert with_range({"type": "string"}, text) == {"type": "string"}


def test_json_becomes_arguments():
    schema = SpottedPipeline.schema()
    image = Image.new("RGB", (3, 2), "red")
    values = {
        "prompt": "a",
        "height": 32.0,
        "mood": "wild",
        "spots": [{"x": 1, "words": ["a", 2], "image": png(image)}],
    }
    found = arguments_from_json(schema, json.loads(json.dumps(values)))
    (spot,) = found.pop("spots")
    assert found == {"prompt": "a", "height": 32, "mood": Mood.WILD}
    assert isinstance(found["height"], int)
    assert (spot.x, spot.words, spot.image.size, spot.image.getpixel((0, 0))) == (1, ("a", 2), (3, 2), (255, 0, 0))


def test_a_dataclass_of_the_library():
    schema = schema_of(list[ControlNetInput])
    assert schema["items"]["properties"]["image"]["anyOf"][0] == IMAGE
    assert schema["items"]["properties"]["scale"] == {"type": "number", "default": 1.0}


@pytest.mark.parametrize(
    ("values", "error", "message"),
    [
        ([], TypeError, "expected a JSON object"),
        ({"promt": "a"}, TypeError, "unknown argument 'promt'; did you mean 'prompt'? SpottedPipeline takes: "),
        ({"on_step": 1}, TypeError, "'on_step' can only be given by a program in the same process"),
        ({"prompt": 3}, ValueError, "prompt=3: expected text or a list of text"),
        ({"prompt": ["a", 3]}, ValueError, "expected text or a list of text"),
        ({"num_inference_steps": 0}, ValueError, "num_inference_steps=0: expected an integer, at least 1"),
        ({"num_inference_steps": True}, ValueError, "num_inference_steps=True: expected an integer"),
        ({"height": 1.5}, ValueError, "height=1.5: expected an integer"),
        ({"output_type": "jpeg"}, ValueError, "output_type='jpeg': expected one of pil, tensor, latents"),
        ({"mood": "sad"}, ValueError, "mood='sad': expected one of calm, wild or null"),
        ({"spots": [{"x": 1, "image": "????"}]}, ValueError, "Only base64 data is allowed"),
        ({"spots": [{"x": 1, "image": "aGVsbG8="}]}, ValueError, "cannot identify image"),
        ({"spots": [{}]}, ValueError, "without x"),
        ({"spots": [{"x": 1, "wrods": []}]}, ValueError, "no field 'wrods'; did you mean 'words'?"),
        ({"spots": [{"x": 1, "words": ["a"]}]}, ValueError, "spots="),
        ({"spots": [{"x": -1}]}, ValueError, "x=-1: expected 0 or more"),
        ({"denoising_strength": float("nan")}, ValueError, "denoising_strength=nan: expected a number"),
        ({"height": 1e999}, ValueError, "height=inf: expected an integer"),
        ({"height": None}, ValueError, "height=None: expected an integer"),
    ],
)
def test_bad_json_is_said(values, error, message):
    with pytest.raises(error) as caught:
        arguments_from_json(SpottedPipeline.schema(), values)
    assert message in str(caught.value)


def test_images_may_be_opened_by_the_caller():
    red, paths = Image.new("RGB", (8, 8), "red"), []

    def open_file(path):
        paths.append(path)
        return [red, red] if path == "clip" else red

    schema = {"title": "toy", "properties": {"one": IMAGE, "many": {"type": "array", "items": IMAGE}}}
    values = {"one": "a.png", "many": ["b.png", "c.png"]}
    given = arguments_from_json(schema, values, open_file=open_file)
    assert given == {"one": red, "many": [red, red]}
    assert paths == ["a.png", "b.png", "c.png"]
    assert arguments_from_json(schema, {"many": "clip"}, open_file=open_file) == {"many": [red, red]}
    assert arguments_from_json(schema, {"many": "a.png"}, open_file=open_file) == {"many": [red]}
    with pytest.raises(ValueError, match=r"one='clip': expected the path of an image \(it has several images\)"):
        arguments_from_json(schema, {"one": "clip"}, open_file=open_file)
    with pytest.raises(ValueError, match="many='clip': expected a list of a PNG image in base64"):
        arguments_from_json(schema, {"many": "clip"})
    spots = arguments_from_json(SpottedPipeline.schema(), {"spots": [{"x": 1, "image": "a.png"}]}, open_file=open_file)
    assert spots["spots"][0].image is red


def test_what_is_parsed_is_what_the_call_takes():
    pipe = toy_pipeline()
    found = arguments_from_json(pipe.schema(), {"prompt": "four", "seed": 3, "output_type": "pil"})
    assert pipe(**found) == pipe("four", seed=3)
    assert set(found) <= set(inspect.signature(pipe).parameters)


def test_info_carries_it():
    record = json.loads(CliRunner().invoke(program, ["info", "z-image-turbo", "--json"]).stdout)
    assert record["schema"] == model_schema("z-image-turbo")
    assert record["hub_id"] == "Tongyi-MAI/Z-Image-Turbo"
    assert "properties" not in CliRunner().invoke(program, ["info", "z-image-turbo"]).stdout


@pytest.mark.parametrize("error", [ImportError("No module named 'av'"), RuntimeError("at import")])
def test_info_of_a_model_whose_code_is_broken_still_shows_the_record(monkeypatch, error):
    def broken(name):
        raise error

    monkeypatch.setattr("diffsynth.runtime.schema.model_schema", broken)
    result = CliRunner().invoke(program, ["info", "z-image-turbo", "--json"])
    assert result.exit_code == 0
    assert json.loads(result.stdout)["schema"] is None
    assert result.stderr == f"no schema: {type(error).__name__}: {error}. Run: diffsynth doctor\n"
