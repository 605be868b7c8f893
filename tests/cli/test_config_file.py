import json

import pytest

import diffsynth
from diffsynth import provenance
from image_pipeline import image_pipeline

TOML = """
model = "toy-1"
prompt = "abcde"
output = "out.png"
steps = 2
cfg-scale = 2.0
negative_prompt = "ab"
width = 48
denoising_strength = 0.5
"""


@pytest.fixture(autouse=True)
def loaded(monkeypatch, installed):
    monkeypatch.setattr(diffsynth, "load", lambda name, **options: image_pipeline())


def recorded(file):
    made_by = provenance.read(file)
    return {name: made_by[name] for name in ("prompt", "num_inference_steps", "cfg_scale")} | made_by["arguments"]


def test_a_whole_call_in_toml_and_in_json(run, tmp_path):
    (tmp_path / "call.toml").write_text(TOML)
    values = {"model": "toy-1", "prompt": "abcde", "output": "two.png", "num_inference_steps": 2, "cfg_scale": 2.0}
    others = {"negative_prompt": "ab", "width": 48, "denoising_strength": 0.5}
    (tmp_path / "call.json").write_text(json.dumps({**values, **others}))
    for file, out in (("call.toml", "out.png"), ("call.json", "two.png")):
        result = run("generate", "--config", file)
        assert (result.exit_code, result.stdout) == (0, f"{out}\n"), result.output
        assert recorded(out) == {"prompt": "abcde", "num_inference_steps": 2, "cfg_scale": 2.0, **others}


def test_the_command_line_has_precedence(run, tmp_path):
    (tmp_path / "call.toml").write_text(TOML)
    options = ("--steps", 3, "--set", "width=32", "--set", "denoising_strength=0.25", "-o", "own.png")
    result = run("generate", "toy-1", "abc", "--config", "call.toml", *options)
    assert result.exit_code == 0, result.output
    found = recorded("own.png")
    assert (found["prompt"], found["num_inference_steps"], found["denoising_strength"]) == ("abc", 3, 0.25)
    assert "width" not in found  # 32 is the default
    assert found["negative_prompt"] == "ab"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("heigth = 3", "call.toml: unknown key 'heigth'; did you mean 'height'?"),
        ("devise = 'cpu'", "unknown key 'devise'; did you mean 'device'?"),
        ("guidance_scale = 3", "unknown key 'guidance_scale'; did you mean 'cfg_scale'?"),
        ("sampler = 'euler'", "unknown key 'sampler'; did you mean 'solver'?"),
        ("'a b' = 3", "unknown key 'a b'"),
        ("steps = 3\nnum_inference_steps = 4", "num_inference_steps is set twice"),
        ("[steps]\na = 3", "steps is a table; expected a text, a number, true, false or a list"),
        ("steps = 'x'", "Invalid value for '--steps': 'x' is not a valid integer"),
        ("denoising_strength = 'x'", "--set denoising_strength='x': expected a number"),
        ("steps = ", "call.toml is not TOML: Invalid value"),
    ],
)
def test_wrong_files_are_one_error_before_anything_is_loaded(run, monkeypatch, tmp_path, content, message):
    monkeypatch.setattr(diffsynth, "load", lambda *_, **__: 1 / 0)
    (tmp_path / "call.toml").write_text(content)
    result = run("generate", "toy-1", "abc", "-o", "out.png", "--config", "call.toml")
    assert result.exit_code == 2
    assert message in result.stderr
    assert not (tmp_path / "out.png").exists()


def test_files_that_cannot_be_read(run, tmp_path):
    for name, content, message in (
        ("none.toml", None, "none.toml: No such file or directory"),
        ("list.json", b"[1]", "list.json: expected a JSON object of names and values"),
        ("bad.json", b"{", "bad.json is not JSON"),
        ("latin.toml", b"prompt = '\xe9'", "latin.toml is not in UTF-8; save it in UTF-8"),
    ):
        if content is not None:
            (tmp_path / name).write_bytes(content)
        assert message in run("generate", "toy-1", "-o", "out.png", "--config", name).stderr


def test_one_text_for_an_option_that_may_be_repeated(run, tmp_path):
    (tmp_path / "call.toml").write_text("lora = 'none.safetensors:0.5'")
    result = run("generate", "toy-1", "abc", "-o", "out.png", "--config", "call.toml")
    assert "none.safetensors does not exist" in result.stderr
