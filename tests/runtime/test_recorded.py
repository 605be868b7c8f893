"""`return_record=True`: the output, its seeds and its record in one object."""

import json

import pytest
import torch

from diffsynth import provenance
from diffsynth.runtime.cascade import Cascade, CascadeStage
from diffsynth.runtime.recorded import RecordedOutput
from image_pipeline import catalog, image_pipeline, use
from label_pipeline import label_pipeline
from toy_pipeline import toy_pipeline

GIVEN = {"num_inference_steps": 2, "height": 32, "width": 32}


@pytest.fixture
def pipe(monkeypatch):
    use(monkeypatch, catalog())
    return image_pipeline()


def replayed(pipe, record):
    """Return the output of the call that a record describes."""
    return pipe(**{name: record[name] for name in ("prompt", "seed", "num_inference_steps")}, **record["arguments"])


def test_a_random_seed_is_in_the_record_and_gives_the_same_bits(pipe):
    made = pipe("abc", **GIVEN, return_record=True)
    (seed,) = made.seeds
    assert made.record["seed"] == seed
    assert made.record == provenance.record(pipe, {"prompt": "abc", "seed": seed, **GIVEN})
    assert json.loads(json.dumps(made.record)) == made.record
    assert replayed(pipe, made.record).tobytes() == made.output.tobytes()
    assert [one.record for one in made.results] == [made.record]
    assert pipe("abc", **GIVEN, return_record=True).seeds != made.seeds


def test_the_output_is_that_of_the_call_without_it():
    pipe = toy_pipeline()
    made = pipe("abc", seed=3, return_record=True)
    assert isinstance(made, RecordedOutput)
    assert (made.output, made.seeds) == (pipe("abc", seed=3), (3,))
    assert pipe("abc", seed=3, return_record=False) == made.output
    with pytest.raises(ValueError, match="return_record='yes'"):
        pipe("abc", return_record="yes")


def test_each_result_has_a_record_of_its_own(pipe):
    made = pipe(["ab", "cde"], num_images=2, **GIVEN, return_record=True)
    first = made.seeds[0]
    assert made.seeds == tuple(range(first, first + 4))
    assert (made.record["prompt"], made.record["arguments"]["num_images"]) == (["ab", "cde"], 2)
    assert [one.record["prompt"] for one in made.results] == ["ab", "ab", "cde", "cde"]
    for one, image in zip(made.results, made.output, strict=True):
        assert one.output is image
        assert (one.record["seed"],) == one.seeds
        assert "num_images" not in one.record["arguments"]
        assert replayed(pipe, one.record).tobytes() == image.tobytes()
    again = replayed(pipe, made.record)
    assert [each.tobytes() for each in again] == [each.tobytes() for each in made.output]


def test_lists_of_other_arguments_and_seeds():
    pipe = label_pipeline()
    made = pipe(label=[3, 7], seed=[9, 4], return_record=True)
    assert made.seeds == (9, 4)
    assert [(one.record["seed"], one.record["arguments"]["label"]) for one in made.results] == [(9, 3), (4, 7)]
    for one in made.results:
        assert torch.equal(one.output, pipe(label=one.record["arguments"]["label"], seed=one.record["seed"]))


def test_defaults_of_the_model_and_loras_are_covered():
    pipe = toy_pipeline().named("toy", {"seed": 5})
    assert pipe("abc", return_record=True).seeds == (5,)
    made = pipe("abc", seed=None, return_record=True)
    assert made.seeds == (made.record["seed"],)
    assert pipe("abc", seed=made.seeds[0]) == made.output
    pipe.components["dit"].layer = torch.nn.Linear(2, 2)
    lora = {"layer.lora_A.weight": torch.ones(1, 2), "layer.lora_B.weight": torch.ones(2, 1)}
    pipe.load_lora(pipe.dit, state_dict=lora, call_defaults={"num_inference_steps": 2})
    made = pipe("abc", return_record=True)
    assert made.record["num_inference_steps"] == 2
    assert made.record["loras"] == [
        {"role": "dit", "alpha": 1.0, "hot": False, "files": {}, "call_defaults": {"num_inference_steps": 2}}
    ]


def test_a_cascade_has_the_records_of_its_stages(pipe):
    cascade = Cascade(
        CascadeStage("base", pipe),
        CascadeStage("refine", pipe, inputs={"input_image": "base"}, arguments={"denoising_strength": 0.5}),
    )
    made = cascade(["ab", "cde"], **GIVEN, refine={"num_inference_steps": 3}, return_record=True)
    first, second = made.seeds
    assert second == first + 1
    stages = made.record["stages"]
    assert list(stages) == ["base", "refine"]
    assert [each["seed"] for each in stages.values()] == [first, first]
    assert [each["num_inference_steps"] for each in stages.values()] == [2, 3]
    assert [each["inputs"] for each in stages.values()] == [{}, {"input_image": "base"}]
    assert json.loads(json.dumps(made.record)) == made.record
    again = cascade(["ab", "cde"], **GIVEN, refine={"num_inference_steps": 3}, seed=first)
    assert again == made.output
    for one, prompt, seed in zip(made.results, ("ab", "cde"), made.seeds, strict=True):
        assert {(each["prompt"], each["seed"]) for each in one.record["stages"].values()} == {(prompt, seed)}
    with pytest.raises(TypeError, match="'return_record' of stage 'base'"):
        cascade("ab", base={"return_record": True})
    with pytest.raises(TypeError, match="return_record is an argument of the cascade's call"):
        CascadeStage("base", pipe, arguments={"return_record": True})
