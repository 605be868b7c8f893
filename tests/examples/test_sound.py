"""The example plugin that generates sound."""

import wave

import pytest
import torch
from click.testing import CliRunner
from diffusers import FlowMatchEulerDiscreteScheduler

import diffsynth
from diffsynth.cli.group import program
from diffsynth.core.data.audio import Audio
from diffsynth.sampling.noise import initial_noise
from example_plugins import EXAMPLES, installed, make_weights, run_conformance, run_readme
from parity import relative_error

CALL = {"frequency": 220.0, "seconds": 0.02, "seed": 0, "num_inference_steps": 4, "output_type": "tensor"}


@pytest.fixture(scope="module", autouse=True)
def _plugin(tmp_path_factory):
    with installed("sound", folder=tmp_path_factory.mktemp("site")):
        yield


@pytest.fixture(scope="module")
def pipe():
    return diffsynth.load("sound-1", device="cpu", torch_dtype=torch.float32)


def test_it_conforms():
    assert "sound_net output does not depend on where weights are stored" in run_conformance("sound")


def test_the_readme_runs(capsys):
    names = run_readme("sound")
    assert capsys.readouterr().out == "torch.Size([1, 4000]) 8000\n"
    assert [sound.samples.shape for sound in names["sounds"]] == [(1, 8000), (1, 8000)]


def test_the_weights_are_those_of_the_script(tmp_path):
    written = EXAMPLES / "sound" / "src" / "diffsynth_sound" / "net.safetensors"
    assert len(make_weights("sound", tmp_path / "net.safetensors")) == written.stat().st_size < 300_000


def test_pitch_length_and_seed_determine_the_sound(pipe):
    samples = pipe(**CALL)
    assert samples.shape == (1, 1, 160)
    assert samples.isfinite().all()
    assert samples.abs().max() <= 1
    assert torch.equal(samples, pipe(**CALL))
    assert not torch.allclose(samples, pipe(**CALL | {"seed": 1}), atol=0.1)
    assert not torch.allclose(samples, pipe(**CALL | {"frequency": 880.0}), atol=1e-3)
    assert pipe(**CALL | {"seconds": 0.0251}).shape == (1, 1, 201)  # no multiple of a token
    assert pipe(**CALL | {"seconds": 0.0251, "output_type": "latents"}).shape == (1, 1, 208)


def test_a_list_gives_a_sound_for_each(pipe):
    sounds = pipe(**CALL | {"frequency": [220.0, 440.0], "output_type": "pil"})
    assert all(isinstance(sound, Audio) and sound.sample_rate == 8000 for sound in sounds)
    assert relative_error(sounds[0].samples, pipe(**CALL)[0]) < 1e-5
    assert relative_error(sounds[1].samples, pipe(**CALL | {"frequency": 440.0, "seed": 1})[0]) < 1e-5


@torch.no_grad()
def test_a_trajectory_is_that_of_diffusers(pipe):
    """diffusers' scheduler takes its steps with the same network; in fp32 they differ by rounding, 1.1e-7 of the
    largest value.
    """
    scheduler = FlowMatchEulerDiscreteScheduler()
    scheduler.set_timesteps(sigmas=[1 - step / 20 for step in range(20)])
    latents = initial_noise((1, 160), [7, 8], dtype=torch.float32, device="cpu")
    frequencies = torch.tensor([220.0, 330.0])
    for timestep in scheduler.timesteps:
        velocity = pipe.net(latents, timestep.expand(2) / 1000, frequencies)
        latents = scheduler.step(velocity, timestep, latents).prev_sample
    call = CALL | {"frequency": [220.0, 330.0], "seed": 7, "num_inference_steps": 20, "output_type": "latents"}
    assert relative_error(pipe(**call), latents) < 1e-5


def test_solvers_of_higher_order_are_nearer_to_the_solution(pipe):
    call = CALL | {"output_type": "latents", "num_inference_steps": 8}
    exact = pipe(**call | {"num_inference_steps": 50}, solver="heun")
    errors = {name: relative_error(pipe(**call, solver=name), exact) for name in ("euler", "heun", "dpmpp_2m", "unipc")}
    assert all(error < 0.75 * errors["euler"] for name, error in errors.items() if name != "euler"), errors


def test_policies_change_no_bit(pipe):
    for policy in ("cpu-offload", "disk"):
        streamed = diffsynth.load("sound-1", device="cpu", torch_dtype=torch.float32, policy=policy)
        assert torch.equal(streamed(**CALL), pipe(**CALL))


def test_a_plan_grows_with_the_length(pipe):
    short, long = (pipe.plan(seconds=seconds, device="cuda", vram_limit=1) for seconds in (1.0, 20.0))
    assert [(stage.name, stage.steps) for stage in short.stages] == [("denoise", 20)]
    assert long.stages[0].activations > 10 * short.stages[0].activations


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"seconds": 0}, "seconds=0: expected a number, above 0 and at most 30"),
        ({"seconds": 31.0}, "seconds=31.0: expected a number, above 0 and at most 30"),
        ({"frequency": [220.0, -1.0]}, "frequency=-1.0: expected a number above 0, in Hz"),
        ({"cfg_scale": 2.0}, "needs the branch 'uncond', for which no unit of SoundPipeline reads other values"),
    ],
)
def test_other_arguments_are_refused(pipe, arguments, message):
    with pytest.raises(ValueError, match=message):
        pipe(**CALL | arguments)


def test_the_command_line_writes_a_wave_file(tmp_path):
    call = ["--set", "seconds=0.5", "--set", "frequency=220", "--steps", "2", "--seed", "0", "--device", "cpu"]
    result = CliRunner().invoke(program, ["generate", "sound-1", "-o", str(tmp_path / "sound.wav"), *call])
    assert result.exit_code == 0, result.output
    with wave.open(str(tmp_path / "sound.wav")) as file:
        assert (file.getnchannels(), file.getframerate(), file.getnframes()) == (1, 8000, 4000)
    result = CliRunner().invoke(program, ["generate", "sound-1", "-o", str(tmp_path / "sound.png"), *call])
    assert result.exit_code != 0
    assert "sound-1 returns audio, and .png is for image" in result.output
