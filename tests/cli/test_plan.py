import json
from types import SimpleNamespace

import pytest
from PIL import Image

from diffsynth.runtime import planning


@pytest.fixture
def planned(monkeypatch, installed):
    """Install `TypedPipeline` and replace the planner; return the list of the arguments of planned calls."""
    installed(task="label-to-something", pipeline="label_pipeline:TypedPipeline")
    calls = []

    def plan_model(record, arguments, **options):
        calls.append(arguments)
        return SimpleNamespace(to_dict=lambda: {"stages": []})

    monkeypatch.setattr(planning, "plan_model", plan_model)
    return calls


def test_settings_reach_the_planner(run, planned, tmp_path):
    Image.new("RGB", (8, 8)).save(tmp_path / "red.png")
    settings = ("--set", "label=3", "--set", "pair=(3, 4)", "--set", "image=red.png")
    result = run("plan", "toy-1", "--steps", 2, *settings, "--json")
    assert result.exit_code == 0, result.output
    (given,) = planned
    assert (given["num_inference_steps"], given["label"], given["pair"]) == (2, 3, (3, 4))
    assert given["image"].size == (8, 8)
    shown = json.loads(result.stdout)["arguments"]
    assert shown == {"num_inference_steps": 2, "label": 3, "pair": [3, 4], "image": "red.png"}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--set", "lable=3"], "unknown argument 'lable'; did you mean 'label'?"),
        (["--set", "label=x"], "--set label='x': expected an integer, at least 0 and at most 9 or a list"),
        (["--steps", "2", "--set", "num_inference_steps=3"], "num_inference_steps is set twice"),
        (["--frames", "9"], "unknown argument 'num_frames'; did you mean 'num_samples'?"),
    ],
)
def test_wrong_arguments(run, planned, options, message):
    result = run("plan", "toy-1", *options)
    assert (result.exit_code, planned) == (2, [])
    assert message in result.stderr
