"""The policy "auto": a plan chooses the storage of weights once, when a pipeline is loaded, and logs the reason."""

from __future__ import annotations

import json
import logging

import pytest
import torch
from click.testing import CliRunner

import diffsynth
from diffsynth.cli.group import program
from diffsynth.core import device as devices
from diffsynth.core.loader import component
from diffsynth.core.planning import Speeds
from diffsynth.core.vram.managed import managed
from diffsynth.core.vram.policy import FP8, Auto, Policy
from diffsynth.errors import NotEnoughMemory
from diffsynth.runtime import memory_options, planning
from diffsynth.runtime.memory_options import MemoryOptions, for_call
from diffsynth.runtime.progress import no_progress
from diffsynth.testing import tiny_hub
from limited import let_blocks_travel

CUDA = torch.device("cuda")
CALL = {"num_inference_steps": 1, "height": 64, "width": 96, "seed": 3}
MODULES = ("dit", "text_encoder", "vae")


@pytest.fixture(autouse=True)
def small_blocks_and_known_speeds(monkeypatch):
    """A slow link, so that streaming the blocks of a tiny network takes longer than computing."""
    let_blocks_travel(monkeypatch, smallest=2**12)
    monkeypatch.setattr(planning, "_speeds", lambda device, dtype: Speeds(1e9, 100e12, 3e9))
    monkeypatch.setattr(devices, "check_device", torch.device)


@pytest.fixture(scope="module")
def hub(tmp_path_factory):
    root = tmp_path_factory.mktemp("hub")
    tiny_hub(root, "z-image-turbo")
    return root


def loaded(hub, **memory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("DIFFSYNTH_MODEL_BASE_PATH", str(hub))
        patch.setenv("DIFFSYNTH_SKIP_DOWNLOAD", "true")
        return diffsynth.load("z-image-turbo", device="cpu", torch_dtype=torch.bfloat16, **memory)


@pytest.fixture(scope="module")
def free(hub):
    return loaded(hub)


@pytest.fixture
def a_device(monkeypatch):
    """The CPU in place of a device with its own memory: storage is chosen for that device."""
    choose = memory_options.choose

    def on_cuda(pipe, options, configs=None):
        chosen = choose(pipe, MemoryOptions(CUDA, options.dtype, options.vram_limit, options.policies), configs)
        return MemoryOptions(options.device, options.dtype, None, chosen.policies)

    monkeypatch.setattr(memory_options, "choose", on_cuda)


def stored(pipe):
    return {role: managed(pipe.components[role]).policy.stored_dtype(torch.bfloat16) for role in MODULES}


def test_storage_is_chosen_by_the_limit_once_and_logged(hub, a_device, caplog):
    caplog.set_level(logging.INFO, logger="diffsynth")
    tight, roomy = (loaded(hub, policy=Auto(CALL), vram_limit=limit) for limit in (0, 8))
    assert set(stored(tight).values()) == {FP8}
    assert set(stored(roomy).values()) == {torch.bfloat16}
    logged = [record.getMessage() for record in caplog.records if "policy 'auto'" in record.getMessage()]
    assert ["'fp8'" in logged[0], "'dynamic'" in logged[1], len(logged)] == [True, True, 2]
    assert all("their own dtype: " in line and "float8_e4m3fn: " in line and "GB a step" in line for line in logged)
    # Smaller than CALL: many CPUs convolve bf16 slowly.
    small = {**CALL, "height": 32, "width": 32, "output_type": "tensor", "progress_bar_cmd": no_progress}
    for pipe, policy in ((tight, "fp8"), (roomy, "none")):
        assert torch.equal(pipe("one", **small), loaded(hub, policy=policy)("one", **small))


def test_a_role_alone_may_be_left_open(hub, a_device):
    pipe = loaded(hub, policy={"dit": Auto(CALL), "text_encoder": "disk", "vae": "fp8"}, vram_limit=0)
    assert stored(pipe) == {"dit": FP8, "text_encoder": torch.bfloat16, "vae": FP8}
    assert managed(pipe.text_encoder).policy.onload.on_disk


def test_a_plan_of_auto_has_both_predictions(free):
    plans = {policy: free.plan(**CALL, device="cuda", vram_limit=0, policy=policy)
             for policy in ("auto", "fp8", "dynamic")}  # fmt: skip
    plan = plans["auto"]
    assert plan.storage == "float8_e4m3fn"
    assert [option.seconds_per_step for option in plan.options] == [
        plans["dynamic"].seconds_per_step,
        plans["fp8"].seconds_per_step,
    ]
    assert plan.bytes_per_step == plans["fp8"].bytes_per_step < 0.6 * plans["dynamic"].bytes_per_step
    assert plans["fp8"].options == ()
    for elsewhere in ({"device": "mps", "vram_limit": 0}, {"device": "cpu", "ram_limit": 8}):
        plan = free.plan(**CALL, **elsewhere, policy="auto")
        assert (plan.storage, plan.options) == ("", ()), "no float8 on the first, no link on the second"


def test_the_refusal_names_the_policy_that_could(free):
    plan = free.plan(**CALL, device="cuda", vram_limit=0)
    limit = plan.smallest_vram / 2**30
    with pytest.raises(NotEnoughMemory, match=r"stored in float8_e4m3fn.*policy='dynamic' can keep this limit"):
        free.plan(**CALL, device="cuda", vram_limit=limit, policy="fp8")
    with pytest.raises(NotEnoughMemory) as refused:
        free.plan(**CALL, device="cuda", vram_limit=limit / 2, policy="fp8")
    assert "can keep" not in str(refused.value)
    assert free.plan(**CALL, device="cuda", vram_limit=limit, policy="auto").storage == ""


def test_without_a_limit_or_without_a_plan_nothing_is_rounded(free, monkeypatch, caplog):
    calls = []
    monkeypatch.setattr(memory_options, "plan_call", lambda *args, **kwargs: calls.append(args))
    for options in (
        MemoryOptions(CUDA, torch.bfloat16, None, "auto"),
        MemoryOptions(torch.device("cpu"), torch.bfloat16, 8, "auto"),
    ):
        assert memory_options.choose(free, options).policies == dict.fromkeys(MODULES, "dynamic")
    assert not calls

    def refuse(*args, **kwargs):
        raise NotEnoughMemory("too small")

    monkeypatch.setattr(memory_options, "plan_call", refuse)
    options = MemoryOptions(CUDA, torch.bfloat16, 0.001, {"dit": Auto({"height": 64}), "vae": "disk"})
    assert memory_options.choose(free, options).policies == {"dit": "dynamic", "vae": "disk"}
    assert "weights are not rounded, as no plan was made for the call {'height': 64}: too small" in caplog.text


def test_what_is_open_is_chosen_for_the_call_that_is_known():
    defaults = {"height": 128, "num_inference_steps": 12}
    assert for_call("auto", defaults) == Auto(defaults)
    assert for_call({"dit": Auto({"height": 64}), "vae": "disk"}, defaults) == {
        "dit": Auto({"height": 64, "num_inference_steps": 12}),
        "vae": "disk",
    }
    assert for_call("fp8", defaults) == "fp8"
    assert for_call(None, defaults) is None


def test_a_call_that_the_pipeline_does_not_take_is_refused_before_reading(hub, a_device, monkeypatch):

    monkeypatch.setattr(component, "fill_buffers", None)
    with pytest.raises(TypeError, match="did you mean 'height'"):
        loaded(hub, policy=Auto({"heigth": 64}), vram_limit=1)
    with pytest.raises(ValueError, match="expected 'dynamic' or 'fp8' here"):
        Policy.preset("auto", "cpu")


def test_the_command_says_what_was_weighed(hub, monkeypatch):
    monkeypatch.setenv("DIFFSYNTH_MODEL_BASE_PATH", str(hub))
    size = ["--height", "64", "--width", "96", "--steps", "1", "--vram", "0", "--device", "cuda", "--policy", "auto"]
    got = json.loads(CliRunner().invoke(program, ["plan", "z-image-turbo", *size, "--json"]).stdout)
    assert got["storage"] == "float8_e4m3fn"
    assert [option["storage"] for option in got["options"]] == ["", "float8_e4m3fn"]
    shown = CliRunner().invoke(program, ["plan", "z-image-turbo", *size]).stdout
    assert "stored    in float8_e4m3fn, which changes" in shown
    assert "choice    their own dtype: " in shown
