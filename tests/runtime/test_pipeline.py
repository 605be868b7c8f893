import inspect
import threading
import weakref
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from diffsynth.core.vram.managed import managed
from diffsynth.core.vram.policy import BlockState
from diffsynth.errors import Cancelled, InvalidPipeline, MissingComponent
from diffsynth.runtime.unit import unit
from diffsynth.sampling.noise import initial_noise
from toy_pipeline import ToyNet, ToyPipeline, toy_pipeline


def test_signature_of_class_and_instance():
    names = list(inspect.signature(ToyPipeline.__call__).parameters)
    assert names[:2] == ["self", "prompt"]
    assert set(names[2:]) > {"height", "width", "negative_prompt", "num_inference_steps", "seed", "cancel"}
    assert list(inspect.signature(toy_pipeline()).parameters) == names[1:]
    assert inspect.signature(toy_pipeline()).parameters["num_inference_steps"].default == 4


def test_the_result_follows_the_prompt():
    assert toy_pipeline()("x" * 7, seed=0) == pytest.approx(0.7, abs=1e-5)


def test_values_that_only_the_loop_reads_are_freed_before_decoding():
    """Tokens of Animate-2's reference video, tens of gigabytes, were in memory while the decoder ran."""
    references = []

    @unit("ballast", "weight")
    def load():
        ballast = torch.zeros(2)
        references.append(weakref.ref(ballast))
        return ballast, 1.0

    @unit("colour")
    def shift(*, colour, ballast):
        return colour + ballast[:1]

    @unit("output")
    def decode(*, latents, weight):
        assert references[0]() is None
        return [float(latents.mean()) * weight]

    class Laden(ToyPipeline):
        units = (*ToyPipeline.units, load, shift)
        output_units = (decode,)

    assert toy_pipeline(Laden)("x" * 7, seed=0) == pytest.approx(0.7, abs=1e-5)


def test_one_prompt_gives_one_result_and_several_give_a_list():
    pipe = toy_pipeline()
    assert isinstance(pipe("abc", seed=0), float)
    assert pipe(["abc", "abcde"], seed=0) == pytest.approx([0.3, 0.5], abs=1e-5)
    assert len(pipe("abc", num_images=3)) == 3
    assert len(pipe(["abc"], seed=0)) == 1


def test_a_batch_has_the_latents_of_single_calls():
    pipe = toy_pipeline()
    batch = pipe("abc", num_images=2, seed=5, output_type="latents")
    single = torch.cat([pipe("abc", seed=seed, output_type="latents") for seed in (5, 6)])
    assert torch.equal(batch, single)
    assert torch.equal(pipe(["abc", "abc"], seed=[6, 5], output_type="latents"), batch.flip(0))


def test_guidance_pushes_away_from_the_negative_prompt():
    guided = toy_pipeline()("x" * 6, negative_prompt="x" * 2, cfg_scale=2.0, seed=0)
    assert guided == pytest.approx(0.2 + 2.0 * (0.6 - 0.2), abs=1e-5)


def test_on_step_sees_every_step():
    steps = []
    toy_pipeline()("abc", num_inference_steps=3, on_step=steps.append)
    assert [step.index for step in steps] == [0, 1, 2]
    assert steps[0].sigma == 1.0
    assert steps[-1].sigma_next == 0.0
    assert all(step.num_steps == 3 for step in steps)


def test_cancel_stops_between_steps():
    cancel, seen = threading.Event(), []

    def on_step(step):
        seen.append(step.index)
        if step.index == 1:
            cancel.set()

    with pytest.raises(Cancelled):
        toy_pipeline()("abc", num_inference_steps=5, cancel=cancel, on_step=on_step)
    assert seen == [0, 1]


def test_progress_bar_cmd_wraps_the_steps():
    lengths = []

    def wrap(items):
        items = list(items)
        lengths.append(len(items))
        return items

    toy_pipeline()("abc", progress_bar_cmd=wrap)
    assert lengths == [4]


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"promtp": "x"}, TypeError, "unknown argument 'promtp'; did you mean 'prompt'"),
        (
            {"num_inference_steps": 0},
            ValueError,
            "num_inference_steps=0: expected an integer, at least 1 and at most 10000",
        ),
        ({"height": 0}, ValueError, "height=0: expected an integer, at least 1"),
        ({"width": 12.5}, ValueError, "width=12.5: expected an integer"),
        ({"height": True}, ValueError, "height=True"),
        ({"num_images": 0}, ValueError, "num_images=0"),
        ({"output_type": "pill"}, ValueError, "output_type='pill'.*did you mean 'pil'"),
        ({"cfg_scale": "high"}, ValueError, "cfg_scale='high'"),
        ({"seed": [1, 2]}, ValueError, "list of 1 integers"),
        ({"seed": -1}, ValueError, r"seed=-1: expected an integer from 0 to .*; None is a random seed"),
        ({"prompt": ["a", 3]}, ValueError, r"prompt=\['a', 3\]: expected text or .*entry 1, 3, is int"),
        ({"prompt": ["a", "b"], "negative_prompt": ["a"]}, ValueError, "negative_prompt has 1 entries; expected 2"),
        ({"denoising_strength": 0.0}, ValueError, "strength"),
    ],
)
def test_bad_arguments_are_named_before_anything_runs(arguments, error, message):
    pipe = toy_pipeline()
    pipe.dit.forward = None  # would raise TypeError of its own if it were reached
    with pytest.raises(error, match=message):
        pipe(**arguments)


def test_sizes_are_rounded_up_and_logged(caplog):
    latents = toy_pipeline()("a", height=33, width=48, output_type="latents")
    assert latents.shape == (1, 1, 6, 6)
    assert "33x48 is rounded up to 48x48" in caplog.text


def test_a_missing_role_is_named():
    with pytest.raises(MissingComponent, match="ToyPipeline needs dit"):
        ToyPipeline({}, device="cpu")


def test_an_unknown_role_is_named():
    with pytest.raises(TypeError, match="no role 'dti'; did you mean 'dit'"):
        ToyPipeline({"dti": ToyNet()}, device="cpu")


def test_an_argument_of_an_absent_component_raises():
    @unit("adapted")
    def adapt(adapter, *, adapter_scale: float = 1.0):
        return adapter_scale

    class Adapted(ToyPipeline):
        units = (*ToyPipeline.units, adapt)

    pipe = toy_pipeline(Adapted)
    assert pipe("abc", seed=0) == pytest.approx(0.3, abs=1e-5)
    with pytest.raises(MissingComponent, match="'adapter_scale' needs adapter, which is not loaded"):
        pipe("abc", adapter_scale=0.5)


def test_velocity_reads_only_what_units_write():
    class Broken(ToyPipeline):
        def velocity(self, latents, sigma, *, color):
            return latents

    with pytest.raises(InvalidPipeline, match=r"velocity\(\) of Broken reads 'color'.*did you mean 'colour'"):
        toy_pipeline(Broken)


def test_defaults_of_a_model_are_arguments():
    pipe = toy_pipeline().named("toy", {"height": 64})
    assert pipe("a", output_type="latents").shape[-2:] == (8, 4)
    with pytest.raises(TypeError, match="model 'toy' sets default 'heigth'.*did you mean 'height'"):
        pipe.named("toy", {"heigth": 64})


def test_run_units_keeps_gradients():
    pipe = toy_pipeline()
    values = pipe.run_units(pipe.condition_units(), {"prompt": ["abcd"]})
    latents = torch.randn(1, 1, 4, 4)
    pipe.velocity(latents, torch.tensor([0.5]), colour=values["colour"]).sum().backward()
    assert pipe.dit.gain.grad is not None


class ConfiguredNet(ToyNet):
    def __init__(self):
        super().__init__()
        self.config = SimpleNamespace(channels=3)


@unit("latents", random=True)
def latents_of_the_net(*, channels: int, height, width, seeds, device, dtype):
    return initial_noise((channels, height // 8, width // 8), seeds, dtype=dtype, device=device)


class FactsPipeline(ToyPipeline):
    units = (*ToyPipeline.units[:-1], latents_of_the_net)
    facts = {"channels": "dit.channels"}


def test_a_unit_reads_a_fact_of_a_component():
    pipe = FactsPipeline({"dit": ConfiguredNet()}, device="cpu", torch_dtype=torch.float32)
    assert pipe("x", seed=0, output_type="latents").shape == (1, 3, 4, 4)
    assert "channels" not in inspect.signature(pipe).parameters


def test_a_fact_of_no_role_is_named():
    class Wrong(FactsPipeline):
        facts = {"channels": "dti.channels"}

    with pytest.raises(InvalidPipeline, match=r"'channels' is 'dti.channels'"):
        Wrong({"dit": ConfiguredNet()}, device="cpu", torch_dtype=torch.float32)


def test_a_unit_that_only_requires_a_role_speaks_for_its_arguments():
    @unit("boundary", requires=("adapter",))
    def choose_boundary(*, boundary_sigma: float = 0.5):
        return boundary_sigma

    class Experts(ToyPipeline):
        units = (*ToyPipeline.units, choose_boundary)

    pipe = toy_pipeline(Experts)
    assert pipe("abc", seed=0) == pytest.approx(0.3, abs=1e-5)
    with pytest.raises(MissingComponent, match="'boundary_sigma' needs adapter, which is not loaded"):
        pipe("abc", boundary_sigma=0.7)
    unknown = unit("boundary", requires=("adaptor",))(choose_boundary.function)
    Experts.units = (*ToyPipeline.units, unknown)
    with pytest.raises(InvalidPipeline, match="unit 'choose_boundary' uses role \\['adaptor'\\]"):
        toy_pipeline(Experts)


def test_only_the_expert_in_use_is_on_the_device():
    """`roles_at` returns the expert of a noise level; the experts are swapped once, at the boundary."""

    class Experts(ToyPipeline):
        def roles_at(self, step, values):
            return ("dit",) if step.sigma >= values["boundary"] else ("adapter",)

        def velocity(self, latents, sigma, *, colour, step):
            on_device.append(tuple(role for role in ("dit", "adapter") if is_loaded(self, role)))
            (role,) = self.roles_at(step, {"boundary": 0.8})
            return self.components[role](latents, sigma, colour)

    @unit("boundary")
    def choose_boundary():
        return 0.8

    def is_loaded(pipe, role):
        return managed(pipe.components[role]).state is not BlockState.OFFLOAD

    Experts.units = (*ToyPipeline.units, choose_boundary)
    experts = {role: ToyNet().requires_grad_(False) for role in ("dit", "adapter")}
    pipe = Experts(experts, device="cpu", torch_dtype=torch.float32, policy="cpu-offload")
    on_device, sigmas = [], []
    pipe("abc", seed=0, cfg_scale=2.0, num_inference_steps=4, on_step=lambda step: sigmas.append(step.sigma))
    expected = [("dit",) if sigma >= 0.8 else ("adapter",) for sigma in sigmas for branch in ("cond", "uncond")]
    assert len(set(expected)) == 2
    assert on_device == expected
    assert not any(is_loaded(pipe, role) for role in experts)


def test_numbers_of_numpy_are_numbers():
    """Sizes of arrays and seeds of a NumPy generator were refused: "a int64 of shape (): expected an integer"."""
    pipe = toy_pipeline()
    expected = pipe("abc", seed=7, num_inference_steps=3, output_type="latents")
    found = pipe("abc", seed=np.int64(7), num_inference_steps=np.uint8(3), output_type="latents")
    assert torch.equal(found, expected)
    assert torch.equal(pipe("abc", seed=[np.int64(7)], num_inference_steps=3, output_type="latents"), expected)
    with pytest.raises(ValueError, match="num_inference_steps=3.0: expected an integer"):
        pipe("abc", num_inference_steps=np.float32(3))
