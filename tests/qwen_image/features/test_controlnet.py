"""ControlNets in whole calls: against diffusers' two pipelines (0.42), by step, several at once, and refusals."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from diffusers import QwenImageControlNetInpaintPipeline, QwenImageControlNetPipeline
from diffusers.models.controlnets.controlnet_qwenimage import QwenImageMultiControlNetModel
from PIL import Image
from safetensors.torch import save_file

import diffsynth
from diffsynth import _discovery
from diffsynth.errors import InvalidPipeline, MissingComponent, Unrecognized
from diffsynth.runtime.controlnet import ControlNetInput
from diffsynth.spec import resolve
from diffsynth.testing import tiny_hub
from diffsynth_qwen_image.blockwise_controlnet import BlockwiseControlNet
from diffsynth_qwen_image.controlnet import QwenImageControlNet
from diffsynth_qwen_image.controlnet_config import BlockwiseControlNetConfig, QwenImageControlNetConfig
from parity import TOLERANCE, relative_error, shapes_of
from posterior import encode_to_the_mean
from qwen_image_oracles import DIT, SIZE, counted_prefix, noise, oracle_controlnet, packed, tiny_pipelines, unpacked

SIZES = {name: getattr(DIT, name) for name in ("dim", "n_heads", "prompt_dim", "ffn_dim", "axes_dims")}
UNION = QwenImageControlNetConfig(**SIZES, n_layers=1)
INPAINT = replace(UNION, n_layers=2, control_channels=17)
PROMPTS = {"prompt": "a red apple on a table", "negative_prompt": "blurry"}
STEPS = {"num_inference_steps": 4, **SIZE}
CALL = {"seed": 7, "output_type": "latents", "guidance": "token_norm", **PROMPTS, **STEPS}
SMALL = {"prompt": "a", "cfg_scale": 1, "seed": 7, "output_type": "latents", **STEPS}


def random_image(seed: int, mode: str = "RGB") -> Image.Image:
    shape = (SIZE["height"], SIZE["width"]) + ((3,) if mode == "RGB" else ())
    return Image.fromarray(np.random.default_rng(seed).integers(0, 255, shape, dtype=np.uint8))


EDGES, PHOTO, MASK = random_image(1), random_image(2), random_image(3, "L")


@pytest.fixture(scope="module")
def setting():
    """Our pipeline with two ControlNets, diffusers' components, and its ControlNets."""
    oracles = [oracle_controlnet(config, seed) for seed, config in enumerate((UNION, INPAINT), start=4)]
    networks = [QwenImageControlNet(config).eval() for config in (UNION, INPAINT)]
    for network, oracle in zip(networks, oracles, strict=True):
        network.load_state_dict(oracle.state_dict())
    ours, parts = tiny_pipelines(controlnet=networks)
    return ours, parts, oracles


def oracle_latents(kind, parts, controlnet, **arguments) -> torch.Tensor:
    pipe = kind(**parts, controlnet=controlnet)
    pipe.set_progress_bar_config(disable=True)
    pipe.prompt_template_encode_start_idx = counted_prefix(parts["tokenizer"], pipe.prompt_template_encode)
    return unpacked(pipe(**PROMPTS, **STEPS, latents=packed(noise(7)), output_type="latent", **arguments).images)


@pytest.mark.parametrize("cfg_scale", [1.0, 4.0])
def test_a_control_image(setting, monkeypatch, cfg_scale) -> None:
    """In diffusers both branches of guidance get the hints of the prompt."""
    encode_to_the_mean(monkeypatch)
    ours, parts, oracles = setting
    given = {"control_image": EDGES, "controlnet_conditioning_scale": 0.6, "true_cfg_scale": cfg_scale}
    expected = oracle_latents(QwenImageControlNetPipeline, parts, oracles[0], **given)
    inputs = ControlNetInput(image=EDGES, scale=0.6)
    assert relative_error(ours(**CALL, cfg_scale=cfg_scale, controlnet_inputs=inputs), expected) < TOLERANCE
    assert relative_error(ours(**CALL, cfg_scale=cfg_scale), expected) > 1e-2
    inputs = ControlNetInput(image=PHOTO, scale=0.6)
    assert relative_error(ours(**CALL, cfg_scale=cfg_scale, controlnet_inputs=inputs), expected) > 1e-3


def test_an_image_to_inpaint(setting, monkeypatch) -> None:
    encode_to_the_mean(monkeypatch)
    ours, parts, oracles = setting
    given = {"control_image": PHOTO, "control_mask": MASK, "controlnet_conditioning_scale": 0.8, "true_cfg_scale": 4.0}
    expected = oracle_latents(QwenImageControlNetInpaintPipeline, parts, oracles[1], **given)
    for name in ("image", "inpaint_image"):
        inputs = ControlNetInput(1, scale=0.8, inpaint_mask=MASK, **{name: PHOTO})
        assert relative_error(ours(**CALL, controlnet_inputs=inputs), expected) < TOLERANCE
    inputs = replace(inputs, inpaint_mask=random_image(4, "L"))
    assert relative_error(ours(**CALL, controlnet_inputs=inputs), expected) > 1e-3


def test_two_images_of_one_controlnet_each_with_its_steps(setting, monkeypatch) -> None:
    """diffusers counts progress from 0 to 1; of four steps the first two end at 0.5."""
    encode_to_the_mean(monkeypatch)
    ours, parts, oracles = setting
    expected = oracle_latents(
        QwenImageControlNetPipeline,
        parts,
        QwenImageMultiControlNetModel([oracles[0]]),
        control_image=[EDGES, PHOTO],
        controlnet_conditioning_scale=[0.5, 0.7],
        control_guidance_end=[1.0, 0.5],
        true_cfg_scale=1,
    )
    inputs = [ControlNetInput(image=EDGES, scale=0.5), ControlNetInput(image=PHOTO, scale=0.7, end=0.5)]
    call = CALL | {"cfg_scale": 1, "guidance": None}
    assert relative_error(ours(**call, controlnet_inputs=inputs), expected) < TOLERANCE
    assert relative_error(ours(**call, controlnet_inputs=[inputs[0], replace(inputs[1], end=0.0)]), expected) > 1e-3


def test_neutral_values_change_no_bit(setting) -> None:
    ours = setting[0]
    plain = ours(**SMALL)
    for inputs in (None, [], ControlNetInput(image=EDGES, scale=0)):
        assert torch.equal(ours(**SMALL, controlnet_inputs=inputs), plain)


def test_roles_follow_the_steps(setting) -> None:
    ours = setting[0]
    inputs = [
        ControlNetInput(image=EDGES, end=0.5),
        ControlNetInput(1, inpaint_image=PHOTO, inpaint_mask=MASK, start=0.4),
    ]
    plan = ours.plan(**SMALL, controlnet_inputs=inputs, device="cuda")
    loop = [(stage.roles, stage.steps) for stage in plan.loop]
    assert loop == [(("dit", "controlnet[0]"), 2), (("dit", "controlnet[1]"), 2)]


def test_prompts_of_a_batch(setting) -> None:
    ours = setting[0]
    inputs = [ControlNetInput(image=EDGES), ControlNetInput(1, image=PHOTO, inpaint_mask=MASK)]
    call = {"output_type": "latents", "cfg_scale": 2.0, "controlnet_inputs": inputs, **STEPS, "num_inference_steps": 2}
    prompts = ["a", "a red apple on a table"]
    both = ours(prompts, seed=[1, 2], **call)
    alone = [ours(prompt, seed=seed, **call) for prompt, seed in zip(prompts, (1, 2), strict=True)]
    assert relative_error(both, torch.cat(alone)) < TOLERANCE


@pytest.mark.parametrize("policy", ["cpu-offload", "dynamic"])
def test_a_policy_changes_no_bit(setting, policy) -> None:
    ours = setting[0]
    call = SMALL | {"controlnet_inputs": ControlNetInput(image=EDGES, end=0.4), "num_inference_steps": 2}
    expected = ours(**call)
    network = QwenImageControlNet(UNION).eval().requires_grad_(False)
    network.load_state_dict(ours.controlnet[0].state_dict())
    components = ours.components | {"controlnet": network}
    pipe = type(ours)(components, device="cpu", torch_dtype=torch.float32, policy={"controlnet": policy})
    assert torch.equal(pipe(**call), expected)
    assert set(pipe.transfers) == {"controlnet[0]"}


@pytest.mark.parametrize(
    ("inputs", "error", "message"),
    [
        ("edges.png", TypeError, "expected ControlNetInput"),
        (ControlNetInput(), ValueError, "an input needs one of image and inpaint_image"),
        (ControlNetInput(2, image=EDGES), ValueError, "controlnet_id=2, and 2 are loaded"),
        (ControlNetInput(1, image=EDGES), ValueError, "ControlNet 1 needs inpaint_mask, and none is given"),
        (ControlNetInput(image=EDGES, inpaint_mask=MASK), ValueError, "ControlNet 0 takes a control image without a"),
    ],
)
def test_what_does_not_fit_is_refused_before_anything_runs(setting, inputs, error, message) -> None:
    with pytest.raises(error, match=message):
        setting[0].check(prompt="a", controlnet_inputs=inputs)


def with_controlnets(pipe, **networks):
    components = pipe.components | {"controlnet": None} | networks
    return type(pipe)(components, device="cpu", torch_dtype=torch.float32)


def test_without_a_controlnet_its_argument_is_refused(setting) -> None:
    inputs = ControlNetInput(image=EDGES)
    with pytest.raises(MissingComponent, match="'controlnet_inputs' needs controlnet, which is not loaded; add"):
        with_controlnets(setting[0]).check(prompt="a", controlnet_inputs=inputs)
    blockwise = BlockwiseControlNet(BlockwiseControlNetConfig(dim=DIT.dim, n_layers=DIT.n_layers))
    with pytest.raises(MissingComponent, match="of another kind: pass blockwise_controlnet_inputs in its place"):
        with_controlnets(setting[0], blockwise_controlnet=blockwise).check(prompt="a", controlnet_inputs=inputs)


def test_a_controlnet_of_another_base_is_refused_when_the_pipeline_is_built(setting) -> None:
    other = QwenImageControlNet(replace(UNION, dim=128, n_heads=4))
    with pytest.raises(InvalidPipeline, match=r"width of the tokens: dit.dim is 64 and controlnet\[0\].dim is 128"):
        with_controlnets(setting[0], controlnet=other)
    blockwise = BlockwiseControlNet(BlockwiseControlNetConfig(dim=DIT.dim, n_layers=3))
    with pytest.raises(InvalidPipeline, match="number of blocks: dit.n_layers is 2 and blockwise_controlnet"):
        with_controlnets(setting[0], blockwise_controlnet=blockwise)


@pytest.mark.parametrize("kind", ["flux_controlnet", "z_image_controlnet", "qwen_image_blockwise_controlnet"])
def test_a_file_of_another_base_or_kind_is_refused_before_it_is_read(kind, tmp_path, monkeypatch) -> None:
    monkeypatch.setenv("DIFFSYNTH_MODEL_BASE_PATH", str(tmp_path))
    monkeypatch.setenv("DIFFSYNTH_SKIP_DOWNLOAD", "true")
    tiny_hub(tmp_path, "qwen-image")
    (spec,) = (each.spec for each in _discovery.catalog().architectures if each.spec.name == kind)
    with torch.device("meta"):
        shapes = shapes_of(resolve(spec.module)(resolve(spec.tiny)))
    save_file({name: torch.zeros(shape) for name, shape in shapes.items()}, tmp_path / "a.safetensors")
    role = "blockwise_controlnet" if kind.startswith("qwen") else ""
    remedy = f"give the file to role {role}" if role else "load a file that is made for it"
    message = f"this is a {kind}; role controlnet of QwenImagePipeline takes one qwen_image_controlnet; {remedy}"
    with pytest.raises(Unrecognized, match=message):
        diffsynth.load("qwen-image", device="cpu", components={"controlnet": tmp_path / "a.safetensors"})
