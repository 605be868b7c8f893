"""The page "Use it in your app": its blocks run in one program, and the effect of each section is checked."""

from __future__ import annotations

import functools
import json
import re
import sys
import types
from pathlib import Path

import numpy as np
import pytest
import torch

import diffsynth
from diffsynth import errors, provenance
from diffsynth.cli.group import program
from diffsynth.core import device
from diffsynth.runtime.schema import HOST_ONLY, MAX_FRAMES, SIZE_LIMITS, model_schema
from documented import blocks, sections

PAGE = (Path(__file__).parents[2] / "docs" / "host-apps.md").read_text(encoding="utf-8")
TITLES = [
    "Load",
    "Describe a call",
    "Show progress",
    "Cancel",
    "asyncio",
    "Threads",
    "Share components",
    "Register a plugin in a running program",
    "Errors",
    "Keep the record",
]


@pytest.fixture(scope="module")
def names(tmp_path_factory):
    """The names that the page's blocks define, all run in order."""
    script = types.ModuleType("__main__")
    defined = vars(script)
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, "__main__", script)
        patch.chdir(tmp_path_factory.mktemp("app"))
        patch.setattr(device, "default_device", lambda: torch.device("cpu"))
        # Many CPUs convolve bf16 slowly.
        patch.setattr(diffsynth, "load", functools.partial(diffsynth.load, torch_dtype=torch.float32))
        for title, text in sections(PAGE).items():
            for _, language, code in blocks(text):
                assert language == "python", f"{title}: only python is run"
                exec(compile(code, f"host-apps.md: {title}", "exec"), defined)
        defined["record_in_the_image"] = provenance.read_png("apple-1.png")
    return defined


def test_sections():
    assert list(sections(PAGE)) == TITLES


def test_load(names):
    assert names["pipe"].model_name == "z-image-nano"
    assert "z-image-nano" in names["ready"]


def test_describe_a_call(names):
    described = json.loads(json.dumps(names["pipe"].schema()))
    described = {
        name: value for name, value in described.items() if name not in ("x-diffsynth-max-pixels", SIZE_LIMITS)
    }
    assert names["schema"] == model_schema("z-image-nano") == described
    assert names["message"].startswith("unknown argument 'num_inference_step'; did you mean 'num_inference_steps'?")
    described = re.findall(r"`(x-diffsynth-[\w-]+)` \|", PAGE)
    text = json.dumps([names["schema"], names["limited"], MAX_FRAMES])  # nano has no frames
    assert described
    assert all(f'"{keyword}"' in text for keyword in described)
    assert re.findall(r"cannot hold: (.+) \|", PAGE) == [", ".join(f"`{name}`" for name in names["schema"][HOST_ONLY])]


def test_show_progress(names):
    assert names["progress"] == [step / 12 for step in range(1, 13)]
    assert names["stages"] == ["load", "encode", "denoise", "decode"]
    assert len(names["previews"]) == 12
    assert names["previews"][-1].size == names["image"].size


def test_cancel(names):
    assert names["cancelled"] is True


def test_sizes_that_fit(names):
    assert names["largest"] > 64 * 64
    assert SIZE_LIMITS not in names["schema"]


def test_asyncio(names):
    assert names["apple"].tobytes() == names["image"].tobytes() != names["cat"].tobytes()
    assert [step.index for step in names["steps"]] == list(range(len(names["steps"])))


def test_threads(names):
    again = [names["generate"](seed) for seed in range(4)]
    assert [image.tobytes() for image in names["images"]] == [image.tobytes() for image in again]
    assert len({image.tobytes() for image in again}) == 4


def test_share_components(names):
    pipe, second, other = names["pipe"], names["second"], names["other"]
    assert all(second.components[role] is part for role, part in pipe.components.items())
    assert other.dit is not pipe.dit
    assert other.text_encoder is pipe.text_encoder
    call = {"prompt": "a red apple", "seed": 0, "height": 32, "width": 32, "num_inference_steps": 2}
    assert other(**call).tobytes() == pipe(**call).tobytes()


def test_register_a_plugin_in_a_running_program(names):
    pipe, call = names["pipe"], {**names["call"], "output_type": "latents"}
    first = {"cfg_scale": 1.0}
    plain, guided = pipe(**call | first), pipe(**call)
    assert names["late"].tobytes() not in {pipe(**names["call"] | first).tobytes(), pipe(**names["call"]).tobytes()}
    assert not torch.equal(plain, guided)
    with pytest.raises(ValueError, match="guidance='late': 'late' is unknown"):
        pipe(**call, guidance="late")


def test_errors(names):
    assert names["not_there"] == (404, "'z-image-nan' is not installed; did you mean 'z-image-nano'?")
    assert names["bad"] == (400, "height=-8: expected an integer, at least 1 and at most 32768")
    table = sections(PAGE)["Errors"].partition("| error |")[2]
    named = [
        name for row in re.findall(r"^\| (`.+?) \|", table, flags=re.MULTILINE) for name in re.findall(r"\w+", row)
    ]
    assert len(named) >= 7
    assert all(issubclass(getattr(errors, name), errors.DiffsynthError) for name in named)


def test_keep_the_record(names):
    record = names["record_in_the_image"]
    assert (record["model"], record["prompt"]) == ("z-image-nano", "a red apple")
    assert record["seed"] == names["made"].seeds[1]
    # A batch of two rounds otherwise than a single call.
    assert np.abs(np.float32(names["again"]) - np.float32(names["made"].output[1])).mean() < 1


def test_every_command_is_in_the_manual():
    text = (Path(__file__).parents[2] / "docs" / "cli.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| `diffsynth ([\w-]+)", text, flags=re.MULTILINE)
    assert set(program.list_commands(None)) == set(rows)


def test_the_sections_of_doctor_are_in_the_manual():
    from diffsynth.diagnosis import SECTIONS

    text = (Path(__file__).parents[2] / "docs" / "cli.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| `(\w+)` \|", text.partition("## doctor")[2], flags=re.MULTILINE)
    assert rows == list(SECTIONS)
