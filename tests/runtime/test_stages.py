"""The stages of a call: what the call runs and a memory plan traces."""

import pytest
import torch

from diffsynth.core.planning import StageKind
from diffsynth.errors import MissingComponent
from diffsynth.runtime.feature import Feature
from diffsynth.runtime.pipeline import Pipeline
from diffsynth.runtime.role import Role
from diffsynth.runtime.unit import Phase, unit
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
