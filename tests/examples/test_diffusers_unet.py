"""The example plugin whose network is a UNet of diffusers."""

import pytest
import torch
from diffusers import DDIMScheduler, UNet2DModel
from safetensors.torch import load_file

import diffsynth
from diffsynth import _discovery
from diffsynth.core.loader import header, recognize
from diffsynth.core.vram.managed import managed
from diffsynth.errors import Refused
from diffsynth.sampling.noise import initial_noise
from diffsynth.sampling.prediction import variance_preserving
from diffsynth.spec import resolve
from example_plugins import EXAMPLES, installed, make_weights, run_conformance, run_readme
from limited import let_blocks_travel
from parity import relative_error

WEIGHTS = EXAMPLES / "diffusers_unet" / "src" / "diffsynth_unet" / "diffusion_pytorch_model.safetensors"
CALL = {"seed": 0, "num_inference_steps": 4, "height": 16, "width": 16, "output_type": "tensor"}


@pytest.fixture(scope="module", autouse=True)
def _plugin(tmp_path_factory):
    with installed("diffusers_unet", folder=tmp_path_factory.mktemp("site")):
        yield


@pytest.fixture(scope="module")
def pipe():
    return diffsynth.load("unet-1", device="cpu", torch_dtype=torch.float32)


def test_it_conforms():
    assert "diffusers_unet output does not depend on where weights are stored" in run_conformance("diffusers_unet")


def test_the_readme_runs():
    names = run_readme("diffusers_unet")
    assert names["image"].size == (32, 32)
    assert len(names["images"]) == 2


def test_the_weights_are_those_of_the_script(tmp_path):
    assert len(make_weights("diffusers_unet", tmp_path / "unet.safetensors")) == WEIGHTS.stat().st_size < 300_000


def test_the_file_is_one_of_diffusers():
    (found,) = recognize.recognize(header.read([WEIGHTS]), *_discovery.catalog().layouts())
    assert (found.checkpoint.name, found.tier) == ("diffusers_unet/diffusers", "structure")
    assert found.config == resolve("diffsynth_unet.config:UNetConfig")()


def test_the_config_of_a_larger_file_is_inferred():
    config = resolve("diffsynth_unet.config:UNetConfig")(
        channels=1, widths=(8, 16, 24), layers=2, attention=(False, True, False)
    )
    with torch.device("meta"):
        net = resolve("diffsynth_unet.unet:UNet")(config)
    shapes = {key: tuple(tensor.shape) for key, tensor in net.state_dict().items()}
    assert resolve("diffsynth_unet.config:infer_config")(shapes) == config


def test_the_seed_determines_the_image(pipe):
    image = pipe(**CALL)
    assert image.shape == (1, 3, 16, 16)
    assert image.isfinite().all()
    assert torch.equal(image, pipe(**CALL))
    assert not torch.allclose(image, pipe(**CALL | {"seed": 1}), atol=0.1)
    images = pipe(**CALL | {"num_images": 2})
    assert relative_error(images[1:], pipe(**CALL | {"seed": 1})) < 1e-5


@torch.no_grad()
def test_a_trajectory_is_that_of_diffusers(pipe):
    """The loop of diffusers: its scheduler, its class, its weights. In fp32 they differ by rounding, at most 5.5e-7 of
    the largest value in any step.
    """
    unet = UNet2DModel(
        block_out_channels=(8, 16),
        layers_per_block=1,
        down_block_types=("DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D"),
        norm_num_groups=4,
    )
    unet.load_state_dict(load_file(WEIGHTS))
    scheduler = DDIMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        clip_sample=False,
        timestep_spacing="trailing",
        prediction_type="v_prediction",
    )
    scheduler.set_timesteps(20)
    latents, theirs = initial_noise((3, 16, 16), [7, 8], dtype=torch.float32, device="cpu"), []
    for timestep in scheduler.timesteps:
        latents = scheduler.step(unet.eval()(latents, timestep).sample, timestep, latents, eta=0.0).prev_sample
        theirs.append(latents)
    ours = []

    def on_step(step):
        ours.append(variance_preserving(step.latents, torch.full((2,), step.sigma_next)))

    call = CALL | {"seed": 7, "num_images": 2, "num_inference_steps": 20, "output_type": "latents"}
    assert torch.equal(pipe(**call, on_step=on_step), ours[-1])
    errors = [relative_error(mine, other) for mine, other in zip(ours, theirs, strict=True)]
    assert max(errors) < 1e-5


@pytest.mark.parametrize("policy", ["cpu-offload", "disk"])
def test_its_blocks_stream_without_a_change_of_any_bit(pipe, policy, monkeypatch):
    """Blocks of this size would stay on the device; here, all are streamed."""
    let_blocks_travel(monkeypatch)
    streamed = diffsynth.load("unet-1", device="cpu", torch_dtype=torch.float32, policy=policy)
    blocks = {f"unet.{name}" for name in ("down_blocks.0", "down_blocks.1", "mid_block", "up_blocks.0", "up_blocks.1")}
    assert blocks <= set(managed(streamed.unet).blocks)
    assert torch.equal(streamed(**CALL, solver="heun"), pipe(**CALL, solver="heun"))


def test_a_step_cache_is_refused_by_name(pipe):
    message = r"step_cache=.* is refused: diffusers_unet declares no blocks that a step cache may skip"
    for step_cache in ("first_block:threshold=0.1", "taylor"):
        with pytest.raises(Refused, match=message):
            pipe(**CALL, step_cache=step_cache)


def test_guidance_is_refused_without_a_condition(pipe):
    with pytest.raises(ValueError, match="needs the branch 'uncond', for which no unit of UNetPipeline reads other"):
        pipe(**CALL, cfg_scale=2.0)


def test_solvers_of_higher_order_are_nearer_to_the_solution(pipe):
    call = CALL | {"height": 8, "width": 8, "output_type": "latents", "num_inference_steps": 8}
    exact = pipe(**call | {"num_inference_steps": 40}, solver="heun")
    errors = {name: relative_error(pipe(**call, solver=name), exact) for name in ("euler", "heun", "dpmpp_2m", "unipc")}
    assert all(error < 0.75 * errors["euler"] for name, error in errors.items() if name != "euler"), errors


def test_a_plan_needs_no_call(pipe):
    image = pipe(**CALL)
    small, large = (pipe.plan(height=side, width=side, device="cuda", vram_limit=1) for side in (32, 128))
    assert [(stage.name, stage.steps) for stage in small.stages] == [("denoise", 50)]
    assert large.stages[0].activations > 10 * small.stages[0].activations
    assert torch.equal(pipe(**CALL), image)
