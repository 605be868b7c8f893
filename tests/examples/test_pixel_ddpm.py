"""The example plugin with a class-conditional DDPM on pixels."""

import pytest
import torch
from click.testing import CliRunner
from diffusers import DDIMScheduler

import diffsynth
from diffsynth.cli.group import program
from diffsynth.errors import Refused
from diffsynth.sampling.noise import initial_noise
from diffsynth.sampling.prediction import variance_preserving
from example_plugins import EXAMPLES, installed, make_weights, run_conformance, run_readme
from parity import relative_error

CALL = {"label": 3, "seed": 0, "num_inference_steps": 4, "height": 16, "width": 16, "output_type": "tensor"}


@pytest.fixture(scope="module", autouse=True)
def _plugin(tmp_path_factory):
    with installed("pixel_ddpm", folder=tmp_path_factory.mktemp("site")):
        yield


@pytest.fixture(scope="module")
def pipe():
    return diffsynth.load("pixel-ddpm", device="cpu", torch_dtype=torch.float32)


def test_it_conforms():
    assert "pixel_unet output does not depend on where weights are stored" in run_conformance("pixel_ddpm")


def test_the_readme_runs():
    names = run_readme("pixel_ddpm")
    assert names["image"].size == (32, 32)
    assert [image.size for image in names["images"]] == [(32, 32), (32, 32)]


def test_the_weights_are_those_of_the_script(tmp_path):
    written = EXAMPLES / "pixel_ddpm" / "src" / "diffsynth_pixelddpm" / "unet.safetensors"
    assert len(make_weights("pixel_ddpm", tmp_path / "unet.safetensors")) == written.stat().st_size < 300_000


def test_label_and_seed_determine_the_image(pipe):
    image = pipe(**CALL)
    assert image.shape == (1, 3, 16, 16)
    assert image.isfinite().all()
    assert torch.equal(image, pipe(**CALL))
    assert not torch.allclose(image, pipe(**CALL | {"seed": 1}), atol=0.1)
    assert not torch.allclose(image, pipe(**CALL | {"label": 4}), atol=1e-3)
    assert pipe(**CALL | {"height": 30}).shape == (1, 3, 32, 16)


def test_a_list_of_labels_gives_an_image_for_each(pipe):
    both = pipe(**CALL | {"label": [3, 4]})
    alone = torch.cat([pipe(**CALL | {"label": label, "seed": seed}) for seed, label in enumerate((3, 4))])
    assert relative_error(both, alone) < 1e-4
    assert len(pipe(**CALL | {"output_type": "pil", "num_images": 2})) == 2


@pytest.mark.parametrize("cfg_scale", [1.0, 2.5])
@torch.no_grad()
def test_a_trajectory_is_that_of_ddim(pipe, cfg_scale):
    """diffusers' scheduler takes its steps with the same network, guided by the null class, 10.

    In fp32 they differ by rounding: at most 1.9e-6 of the largest value in any step.
    """
    scheduler = DDIMScheduler(beta_schedule="linear", clip_sample=False, timestep_spacing="trailing")
    scheduler.set_timesteps(20)
    latents = initial_noise((3, 16, 16), [7, 8], dtype=torch.float32, device="cpu")
    labels, null, theirs = torch.tensor([1, 2]), torch.tensor([10, 10]), []
    for timestep in scheduler.timesteps:
        time = timestep.float().expand(2)
        uncond, cond = pipe.unet(latents, time, null), pipe.unet(latents, time, labels)
        latents = scheduler.step(uncond + cfg_scale * (cond - uncond), timestep, latents, eta=0.0).prev_sample
        theirs.append(latents)
    ours = []

    def on_step(step):
        ours.append(variance_preserving(step.latents, torch.full((2,), step.sigma_next)))

    call = CALL | {"label": [1, 2], "seed": 7, "num_inference_steps": 20, "output_type": "latents"}
    assert torch.equal(pipe(**call, cfg_scale=cfg_scale, on_step=on_step), ours[-1])
    errors = [relative_error(mine, other) for mine, other in zip(ours, theirs, strict=True)]
    assert max(errors) < 1e-5


def test_solvers_of_higher_order_are_nearer_to_the_solution(pipe):
    call = CALL | {"height": 8, "width": 8, "output_type": "latents", "num_inference_steps": 16}
    exact = pipe(**call | {"num_inference_steps": 60}, solver="heun")
    errors = {name: relative_error(pipe(**call, solver=name), exact) for name in ("euler", "heun", "dpmpp_2m", "unipc")}
    assert all(error < 0.75 * errors["euler"] for name, error in errors.items() if name != "euler"), errors


def test_a_solver_with_noise(pipe):
    call = CALL | {"solver": "euler_ancestral"}
    assert torch.equal(pipe(**call), pipe(**call))
    assert pipe(**call).isfinite().all()
    assert not torch.allclose(pipe(**call), pipe(**CALL), atol=0.1)


def test_a_plan_needs_no_call(pipe):
    image = pipe(**CALL)
    plan = pipe.plan(label=[1, 2], height=64, width=64, cfg_scale=2.0, device="cuda", vram_limit=1)
    assert [(stage.name, stage.steps) for stage in plan.stages] == [("denoise", 50)]
    assert torch.equal(pipe(**CALL), image)


@pytest.mark.parametrize("label", [10, -1, True, 2.0, "3", [1, 10]])
def test_other_labels_are_refused(pipe, label):
    with pytest.raises(ValueError, match="label=.*: expected an integer"):
        pipe(**CALL | {"label": label})


def test_other_arguments_are_refused(pipe):
    with pytest.raises(TypeError, match="unknown argument 'lable'; did you mean 'label'"):
        pipe(lable=3)
    with pytest.raises(TypeError, match="unknown argument 'prompt'"):
        pipe("a cat")
    with pytest.raises(Refused, match="pixel_unet declares no blocks that a step cache may skip"):
        pipe(**CALL, step_cache="taylor")


def test_the_schema_has_the_label(pipe):
    label = pipe.schema()["properties"]["label"]
    assert label["description"].startswith("Class of the image")
    assert (label["default"], label["anyOf"][0]) == (0, {"type": "integer", "minimum": 0})
    assert "prompt" not in pipe.schema()["properties"]


def test_the_command_line(tmp_path):
    arguments = ["generate", "pixel-ddpm", "-o", str(tmp_path / "out.png"), "--set", "label=3", "--steps", "2"]
    result = CliRunner().invoke(program, [*arguments, "--device", "cpu"])
    assert result.exit_code == 0, result.output
    assert (tmp_path / "out.png").stat().st_size > 1000
