"""The stages of a call: what the call runs and a memory plan traces."""

import threading
from concurrent.futures import ThreadPoolExecutor
from itertools import groupby

import pytest
import torch

from diffsynth.core.planning import StageKind
from diffsynth.core.progress import reporting, task
from diffsynth.core.vram.managed import managed
from diffsynth.core.vram.policy import BlockState
from diffsynth.errors import Cancelled, MissingComponent
from diffsynth.runtime.feature import Feature
from diffsynth.runtime.pipeline import Pipeline
from diffsynth.runtime.role import Role
from diffsynth.runtime.unit import Phase, unit
from progress_parts import check_parts
from tiny_z_image import tiny_z_image
from toy_pipeline import ToyNet, ToyPipeline


@unit("output")
def brighten(adapter, *, output, gain: float = 1.0):
    """An output unit of a feature, with a network of its own."""
    return [value * gain for value in output]


BRIGHTEN = Feature("brighten", roles={"adapter": Role(architectures=("toy_net",), optional=True)}, outputs=(brighten,))


class Bright(ToyPipeline):
    """The toy pipeline with an output feature."""

    features = (BRIGHTEN,)


def bright(**components) -> Bright:
    return Bright({"dit": ToyNet(), **components}, device="cpu", torch_dtype=torch.float32)


def test_stages_are_listed_in_running_order():
    pipe = bright(adapter=ToyNet())
    stages = pipe.stages(pipe.check(prompt="abc"))
    assert [(stage.kind, stage.name, stage.roles) for stage in stages] == [
        (StageKind.PREPARE, "round_size", ()),
        (StageKind.PREPARE, "schedule", ()),
        (StageKind.PREPARE, "encode_colour", ()),
        (StageKind.PREPARE, "initial_latents", ()),
        (StageKind.DENOISE, "denoise", ("dit",)),
        (StageKind.OUTPUT, "decode", ()),
        (StageKind.OUTPUT, "brighten", ("adapter",)),
    ]
    latents_only = pipe.stages(pipe.check(prompt="abc", output_type="latents"))
    assert [stage.name for stage in latents_only] == [stage.name for stage in stages[:5]]


def test_an_output_feature_changes_the_result():
    pipe = bright(adapter=ToyNet())
    assert pipe("x" * 4, seed=0) == pytest.approx(0.4, abs=1e-5)
    assert pipe("x" * 4, seed=0, gain=2.0) == pytest.approx(0.8, abs=1e-5)


def test_an_output_feature_without_its_optional_role_is_left_out():
    pipe = bright()
    assert pipe("x" * 4, seed=0) == pytest.approx(0.4, abs=1e-5)
    with pytest.raises(MissingComponent, match="argument 'gain' needs adapter, which is not loaded"):
        pipe("abc", gain=2.0)


def test_an_output_unit_without_a_role_that_it_needs_is_refused_before_anything_runs():
    """`latents` need no output unit."""

    @unit("output")
    def decode(vae, *, latents):
        return [0.0]

    class Decoded(ToyPipeline):
        roles = {**ToyPipeline.roles, "vae": Role(architectures=("toy_net",))}
        output_units = (decode,)

    pipe = Decoded.from_components(dit=ToyNet(), device="cpu", torch_dtype=torch.float32)
    assert pipe("abc", output_type="latents").shape == (1, 1, 4, 4)
    pipe.dit.forward = None
    with pytest.raises(MissingComponent, match="unit 'decode' needs vae.*output_type='latents'"):
        pipe("abc")


@unit("doubled", phase=Phase.ENCODE)
def double(dit, *, number: int = 1):
    return number * 2


@unit("output")
def as_text(*, doubled: int):
    return [str(doubled)]


class OneShot(Pipeline):
    """A pipeline without a loop."""

    roles = {"dit": Role(architectures=("toy_net",))}
    units = (double,)
    output_units = (as_text,)


def test_a_pipeline_without_a_loop_needs_no_schedule():
    pipe = OneShot({"dit": ToyNet()}, device="cpu", torch_dtype=torch.float32)
    assert pipe(number=4) == "8"
    assert [stage.kind for stage in pipe.stages(pipe.check())] == [StageKind.PREPARE, StageKind.OUTPUT]
    with pytest.raises(TypeError, match="unknown argument 'num_inference_steps'"):
        pipe(num_inference_steps=3)
    with pytest.raises(ValueError, match="output_type='latents': OneShot has no denoising loop"):
        pipe(output_type="latents")
    with pytest.raises(TypeError, match="unknown argument 'prompt'"):
        pipe("a text")


def test_parts_of_the_loop_are_runs_of_equal_roles():
    class Experts(ToyPipeline):
        def roles_at(self, step, values):
            return ("dit",) if step.index < 2 else ("adapter",)

    pipe = Experts({"dit": ToyNet(), "adapter": ToyNet()}, device="cpu", torch_dtype=torch.float32)
    request = pipe.check(prompt="abc", seed=0, num_inference_steps=5)
    values = pipe.call_values(request)
    for stage in pipe.stages(request):
        if stage.kind is StageKind.DENOISE:
            parts = stage.parts(values, at_most=2)
        else:
            stage.run(values)
        if stage.kind is StageKind.DENOISE:
            break
    assert [(part.name, part.roles, part.steps, part.traced) for part in parts] == [
        ("denoise (dit)", ("dit",), 2, 2),
        ("denoise (adapter)", ("adapter",), 3, 2),
    ]
    before = values.shared["latents"].clone()
    parts[0].run()
    assert not torch.equal(values.shared["latents"], before)


def test_progress_of_a_call_by_stage():
    seen = []
    pipe = bright(adapter=ToyNet())
    assert pipe("abc", seed=0, on_progress=seen.append) == pipe("abc", seed=0)
    check_parts(seen)
    assert [stage for stage, _ in groupby(each.stage for each in seen)] == ["encode", "denoise", "decode"]
    units = ["round_size", "schedule", "encode_colour", "initial_latents"]
    assert [(each.done, each.total) for each in seen if each.stage == "denoise"] == [(done, 4) for done in range(5)]
    assert list(dict.fromkeys(each.description for each in seen if each.stage == "encode"))[1:] == units
    assert {each.unit for each in seen} == {"units", "steps"}


def test_progress_of_tiles_and_their_cancellation():
    seen, cancel = [], threading.Event()
    pipe = tiny_z_image(with_autoencoder=True)
    size = pipe.vae.config.factor * 4
    call = {"height": size, "width": size, "num_inference_steps": 1, "seed": 0, "tile_size": 2, "tile_stride": 2}
    call |= {"tiled": True, "output_type": "tensor"}
    whole = pipe("a red apple", **call, on_progress=seen.append)
    check_parts(seen)
    tiles = [each for each in seen if each.unit == "tiles"]
    assert [(each.stage, each.description, each.done, each.total) for each in tiles] == [
        ("decode", "decode_image", done, 4) for done in range(5)
    ]

    def on_progress(each):
        if each.unit == "tiles" and each.done == 2:
            cancel.set()

    with pytest.raises(Cancelled):
        pipe("a red apple", **call, on_progress=on_progress, cancel=cancel)
    assert torch.equal(pipe("a red apple", **call), whole)


def test_an_exception_of_on_progress_ends_the_call_and_frees_the_device():
    pipe = ToyPipeline(
        {"dit": ToyNet().requires_grad_(False)}, device="cpu", torch_dtype=torch.float32, policy="cpu-offload"
    )

    def on_progress(each):
        if (each.stage, each.done) == ("denoise", 2):
            raise ZeroDivisionError("mine")

    with pytest.raises(ZeroDivisionError, match="mine"):
        pipe("abc", seed=0, on_progress=on_progress)
    assert managed(pipe.dit).state is BlockState.OFFLOAD
    assert pipe("x" * 4, seed=0) == pytest.approx(0.4, abs=1e-5)


def test_calls_inside_of_a_call_and_in_threads_report_to_their_own_callback():
    pipe, outer, inner = bright(), [], []

    def on_step(step):
        pipe("abc", seed=0)
        pipe("abc", seed=0, num_inference_steps=2, on_progress=inner.append)

    with ThreadPoolExecutor(1) as pool:
        other = []
        beside = pool.submit(pipe, "abc", seed=0, num_inference_steps=7, on_progress=other.append)
        pipe("abc", seed=0, on_step=on_step, on_progress=outer.append)
        beside.result()
    totals = [{each.total for each in seen if each.stage == "denoise"} for seen in (outer, inner, other)]
    assert totals == [{4}, {2}, {7}]
    check_parts(outer)
    check_parts(other)


def test_a_plan_reports_nothing():
    seen = []
    with reporting(seen.append), task("load", total=1, unit="components"):
        tiny_z_image(with_autoencoder=True).plan(height=32, width=32, num_inference_steps=1, on_progress=seen.append)
    assert {each.unit for each in seen} == {"components"}
