"""The largest sizes that fit are those of the planner, and the same in the schema, in JSON and in `check()`."""

from __future__ import annotations

import json

import pytest
import torch

from diffsynth.core.planning.workload import GIB
from diffsynth.errors import NotEnoughMemory
from diffsynth.runtime import planning, size_limits
from diffsynth.runtime.planning import plan_call
from diffsynth.runtime.schema import MAX_FRAMES, MAX_PIXELS, arguments_from_json, model_schema
from diffsynth.runtime.size_limits import SizeLimits, StageMemory, measure_limits
from diffsynth_wan import WanVideoPipeline
from label_pipeline import label_pipeline
from tiny_z_image import tiny_z_image
from toy_pipeline import ToyPipeline, toy_pipeline

SIZES = {"height": 512, "width": 512}


@pytest.fixture
def two_gib(monkeypatch):
    """A memory of 2 GiB, of which the tests that ran before in this process take a quarter."""
    monkeypatch.setattr(size_limits.devices, "total_memory", lambda device: 2 * GIB)
    monkeypatch.setattr(planning, "memory_in_use", lambda device: GIB // 2)


@pytest.fixture(scope="module")
def pipe():
    return tiny_z_image(with_autoencoder=True)


def test_the_memory_is_that_of_plans_of_other_sizes(pipe, two_gib):
    limits = measure_limits(pipe, torch.device("cuda"), SIZES)
    assert limits.defaults == SIZES
    side = int(limits.most_pixels() ** 0.5)
    assert side > 2 * SIZES["height"]
    for height, width in ((side // 16 * 16, side // 16 * 16), (256, 4096)):
        peak = plan_call(pipe, {"height": height, "width": width}, device="cuda").peak_vram
        assert limits.needed(height * width) == pytest.approx(peak, rel=0.01)


def test_a_limit_counts_what_a_plan_can_lower(two_gib, monkeypatch):
    pipe = tiny_z_image(with_autoencoder=True)
    for part in pipe.parts.values():
        if isinstance(part, torch.nn.Module):
            part.requires_grad_(False)
    offloaded = type(pipe)(pipe.components, device="cpu", torch_dtype=torch.float32, policy="cpu-offload")
    size = {"height": 1024, "width": 1024}  # as large as a tile
    limits = measure_limits(offloaded, torch.device("cuda"), size)
    plan, plans = plan_call(offloaded, {"height": 3072, "width": 3072}, device="cuda", vram_limit=0), []
    assert plan.switches == {"tiled": True}
    assert limits.needed(3072**2) == pytest.approx(plan.peak_vram, rel=0.05)
    assert (limits.where, limits.memory) == ("cuda", 2 * GIB)
    offloaded.vram_limit = 0.5
    monkeypatch.setattr(size_limits, "plan_call", lambda *_, **given: plans.append(given) or plan)
    limits = measure_limits(offloaded, torch.device("cuda"), size)
    assert (limits.where, limits.memory) == ("vram_limit=0.5", GIB // 2)
    assert [given["vram_limit"] for given in plans] == [0, 0]


def test_schema_json_and_check_have_one_bound(two_gib):
    pipe = tiny_z_image(with_autoencoder=True)
    assert MAX_PIXELS not in pipe.schema()
    schema = json.loads(json.dumps(pipe.schema(fits=SIZES)))
    most = schema[MAX_PIXELS]
    assert most > SIZES["height"] * SIZES["width"]
    width = 1024
    fits, too_large = {"height": most // width, "width": width}, {"height": most // width + 1, "width": width}
    assert arguments_from_json(schema, fits) == fits
    assert pipe.check(prompt="a", **fits).values["height"] == fits["height"]
    message = rf"height={too_large['height']}, width=1024: the call takes about 2.0 GiB, and this machine has 2.0 GiB"
    for refuse in (lambda: arguments_from_json(schema, too_large), lambda: pipe.check(prompt="a", **too_large)):
        with pytest.raises(NotEnoughMemory, match=rf"{message}; height times width can be at most {most}\. Lower"):
            refuse()
    assert pipe.schema() == pipe.schema(fits=True) == schema


def test_absurd_sizes_are_refused_without_a_plan(pipe):
    for schema, check, names in (
        (pipe.schema(), lambda **call: pipe.check(prompt="a", **call), ("height", "width")),
        (ToyPipeline.schema(), toy_pipeline().check, ("height", "width")),
        (WanVideoPipeline.schema(), None, ("height", "width", "num_frames")),
    ):
        for name in names:
            most = schema["properties"][name]["maximum"]
            assert most == (100_000 if name == "num_frames" else 32_768)
            with pytest.raises(ValueError, match=rf"{name}={most + 1}: expected an integer.* at most {most}"):
                arguments_from_json(schema, {name: most + 1})
            if check is not None:
                with pytest.raises(ValueError, match=rf"{name}=100000: expected an integer.* at most {most}"):
                    check(**{name: 100_000})
        assert schema["properties"]["num_inference_steps"]["maximum"] == 10_000


def test_frames_and_pixels_of_one_frame_count_apart():
    stages = (StageMemory("denoise", 100, 0, 1), StageMemory("decode", 200, 40))
    limits = SizeLimits("cuda:0", 1000, stages, {"height": 2, "width": 5, "num_frames": 8})
    assert (limits.most_pixels(1), limits.most_pixels(), limits.most_pixels(90)) == (20, 20, 10)
    assert limits.most_frames() == 90
    assert SizeLimits.from_json(json.loads(json.dumps(limits.to_json()))) == SizeLimits(
        "cuda:0", 1000, stages, dict(limits.defaults)
    )
    limits.check({"height": 2, "num_frames": 90})
    with pytest.raises(NotEnoughMemory, match="height=2, width=5, num_frames=91: .* at most 9 with num_frames=91"):
        limits.check({"height": 2, "num_frames": 91})
    nothing = SizeLimits("cuda:0", 50, stages, {"height": 2, "width": 5})
    with pytest.raises(NotEnoughMemory, match="no size fits"):
        nothing.check({})


def test_the_schema_of_a_model_is_measured_on_the_default_device(monkeypatch):
    limits = SizeLimits("cuda:0", 1000, (StageMemory("decode", 0, 1, 1),), {"height": 2, "width": 5, "num_frames": 3})
    given = []
    monkeypatch.setattr(size_limits, "measure_limits", lambda *each: given.append(each) or limits)
    schema = model_schema("z-image-nano", fits=True)
    assert (schema[MAX_PIXELS], schema[MAX_FRAMES]) == (250, 99)
    ((pipe, device, arguments),) = given
    assert (pipe.device.type, pipe.dtype, device.type in ("cpu", "cuda"), arguments) == (
        "meta",
        torch.bfloat16,
        True,
        {},
    )


def test_a_pipeline_without_sizes_has_no_limits(two_gib):
    pipe = label_pipeline()
    assert pipe.schema(fits=True) == pipe.schema()
