"""ControlNets in whole calls: against diffusers, by step, several at once, under a policy, with plans and LoRAs."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from diffusers import (
    ZImageControlNetInpaintPipeline,
    ZImageControlNetModel,
    ZImageControlNetPipeline,
    ZImageTransformer2DModel,
)
from PIL import Image
from safetensors.torch import save_file

import diffsynth
from diffsynth.cli import group
from diffsynth.errors import MissingComponent
from diffsynth.runtime.controlnet import ControlNetInput
from diffsynth_zimage.config import ZImageControlNetConfig
from diffsynth_zimage.controlnet import ZImageControlNet
from limited import keep_limit, let_blocks_travel
from parity import TOLERANCE, draw_weights, relative_error, shapes_of
from processes import run_together
from z_image_oracles import DIT, SIZE, noise, tiny_pipelines

BLOCK = {name: DIT[name] for name in ("dim", "n_heads", "n_kv_heads")}
VARIANTS = {
    "2.1": ZImageControlNetConfig(**BLOCK, n_layers=2, n_refiner_layers=1),
    "1.0": ZImageControlNetConfig(**BLOCK, n_layers=2, n_refiner_layers=1, in_channels=16, refiner_hints="none"),
}
SMALL = {"height": 64, "width": 48, "num_inference_steps": 4, "seed": 0, "output_type": "latents"}


def random_image(seed: int, mode: str = "RGB") -> Image.Image:
    shape = (SIZE["height"], SIZE["width"]) + ((3,) if mode == "RGB" else ())
    return Image.fromarray(np.random.default_rng(seed).integers(0, 255, shape, dtype=np.uint8), mode)


EDGES, PHOTO, MASK = random_image(1), random_image(2), random_image(3, "L")


def controlnet(variant: str, seed: int = 1) -> ZImageControlNet:
    network = ZImageControlNet(VARIANTS[variant]).eval().requires_grad_(False)
    network.load_state_dict(draw_weights(shapes_of(network), seed))
    return network


def oracle_controlnet(ours: ZImageControlNet, transformer: ZImageTransformer2DModel) -> ZImageControlNetModel:
    config = ours.config
    oracle = ZImageControlNetModel(
        **BLOCK,
        n_refiner_layers=1,
        control_layers_places=[0, 1],
        control_refiner_layers_places=[0],
        control_in_dim=config.in_channels,
        add_control_noise_refiner=None if config.refiner_hints == "none" else config.refiner_hints,
    ).eval()
    oracle.load_state_dict(ours.state_dict())
    return ZImageControlNetModel.from_transformer(oracle, transformer)


@contextmanager
def refining(oracle: ZImageControlNetModel, transformer: ZImageTransformer2DModel, scale: float) -> Iterator[None]:
    """Context manager in which the transformer's own noise refiner gets the ControlNet's hints, as in the published
    code, which runs the refiner once.

    In diffusers they reach the ControlNet's run of the refiner only. A ControlNet of version 1.0 has none.
    """
    if oracle.add_control_noise_refiner is None:
        yield
        return
    inside, hints = [False], [torch.zeros(())]
    handles = [
        oracle.register_forward_pre_hook(lambda *_: inside.__setitem__(0, True)),
        oracle.register_forward_hook(lambda *_: inside.__setitem__(0, False)),
        oracle.control_noise_refiner[-1].register_forward_hook(lambda m, a, out: hints.__setitem__(0, out[0] * scale)),
        transformer.noise_refiner[0].register_forward_hook(lambda m, a, out: out if inside[0] else out + hints[0]),
    ]
    yield
    for handle in handles:
        handle.remove()


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("cfg_scale", [1.0, 3.0])
def test_a_condition_image(variant, cfg_scale):
    network = controlnet(variant)
    ours, parts = tiny_pipelines(controlnet=network)
    oracle = oracle_controlnet(network, parts["transformer"])
    pipe = ZImageControlNetPipeline(**parts, controlnet=oracle)
    pipe.set_progress_bar_config(disable=True)
    call = {"prompt": "a red apple", "negative_prompt": "blurry", "num_inference_steps": 3, **SIZE}
    with refining(oracle, parts["transformer"], 0.6):
        expected = pipe(
            **call,
            control_image=EDGES,
            controlnet_conditioning_scale=0.6,
            guidance_scale=cfg_scale - 1,
            latents=noise(7),
            output_type="latent",
        ).images
    given = {"seed": 7, "cfg_scale": cfg_scale, "output_type": "latents"}
    found = ours(**call, **given, controlnet_inputs=ControlNetInput(image=EDGES, scale=0.6))
    assert relative_error(found, expected) < TOLERANCE
    assert relative_error(ours(**call, **given), expected) > 1e-3


def test_an_image_to_inpaint():
    network = controlnet("2.1")
    ours, parts = tiny_pipelines(controlnet=network)
    oracle = oracle_controlnet(network, parts["transformer"])
    pipe = ZImageControlNetInpaintPipeline(**parts, controlnet=oracle)
    pipe.set_progress_bar_config(disable=True)
    call = {"prompt": "a red apple", "num_inference_steps": 3, **SIZE}
    with refining(oracle, parts["transformer"], 0.75):
        expected = pipe(
            **call,
            image=PHOTO,
            mask_image=MASK,
            control_image=EDGES,
            guidance_scale=0,
            latents=noise(7),
            output_type="latent",
        ).images
    inputs = ControlNetInput(image=EDGES, inpaint_image=PHOTO, inpaint_mask=MASK, scale=0.75)
    found = ours(**call, seed=7, output_type="latents", controlnet_inputs=[inputs])
    assert relative_error(found, expected) < TOLERANCE


@pytest.fixture(scope="module")
def two():
    return tiny_pipelines(controlnet=[controlnet("2.1", 1), controlnet("1.0", 2)])[0]


def test_neutral_values_change_no_bit(two):
    plain = two("a red apple", **SMALL)
    for inputs in (None, [], ControlNetInput(image=EDGES, scale=0)):
        assert torch.equal(two("a red apple", **SMALL, controlnet_inputs=inputs), plain)


def test_two_at_once_add_up_and_each_has_its_steps(two):
    """Only the steps between start and end have its hints; the planner and the loop ask for its network in these."""
    first, second = ControlNetInput(image=EDGES), ControlNetInput(image=PHOTO, controlnet_id=1)
    alone = [two("a red apple", **SMALL, controlnet_inputs=each) for each in (first, second)]
    both = two("a red apple", **SMALL, controlnet_inputs=[first, second])
    assert torch.equal(both, two("a red apple", **SMALL, controlnet_inputs=[first, second]))
    assert all(relative_error(both, each) > 1e-3 for each in alone)
    early = ControlNetInput(image=EDGES, start=1.0, end=0.5)
    seen: list[list[torch.Tensor]] = [[], []]
    for latents, inputs in zip(seen, (early, first), strict=True):
        two("a red apple", **SMALL, controlnet_inputs=inputs, on_step=lambda step, to=latents: to.append(step.latents))
    assert [torch.equal(a, b) for a, b in zip(*seen, strict=True)] == [True, True, False, False]


def test_roles_follow_the_steps(two):
    inputs = [ControlNetInput(image=EDGES, end=0.5), ControlNetInput(image=PHOTO, controlnet_id=1, start=0.4)]
    plan = two.plan(**{**SMALL, "output_type": "latents"}, prompt="a", controlnet_inputs=inputs, device="cuda")
    loop = [(stage.roles, stage.steps) for stage in plan.loop]
    assert loop == [(("dit", "controlnet[0]"), 2), (("dit", "controlnet[1]"), 2)]


@pytest.mark.parametrize("policy", ["cpu-offload", "dynamic"])
def test_a_policy_changes_no_bit(policy):
    given = {"controlnet": [controlnet("2.1", 1), controlnet("1.0", 2)]}
    inputs = [ControlNetInput(image=EDGES, end=0.4), ControlNetInput(image=PHOTO, controlnet_id=1, scale=0.5)]
    plain, _ = tiny_pipelines(**given)
    expected = plain("a red apple", **SMALL, controlnet_inputs=inputs, cfg_scale=2.0)
    components = {**plain.components}
    pipe = type(plain)(components, device="cpu", torch_dtype=torch.float32, policy={"controlnet": policy})
    assert torch.equal(pipe("a red apple", **SMALL, controlnet_inputs=inputs, cfg_scale=2.0), expected)
    assert set(pipe.transfers) == {"controlnet[0]", "controlnet[1]"}


def test_a_limit_changes_no_bit(monkeypatch):
    """The CPU in place of a device with little more memory than the call needs."""
    let_blocks_travel(monkeypatch, smallest=2**12)
    plain, _ = tiny_pipelines(controlnet=[controlnet("2.1", 1), controlnet("1.0", 2)])
    inputs = [ControlNetInput(image=EDGES, end=0.4), ControlNetInput(image=PHOTO, controlnet_id=1, scale=0.5)]
    call = {"prompt": "a red apple", **SMALL, "num_inference_steps": 2, "controlnet_inputs": inputs}
    expected = plain(**call)
    for part in plain.parts.values():
        if isinstance(part, torch.nn.Module):
            part.requires_grad_(False)
    pipe = type(plain)(plain.components, device="cpu", torch_dtype=torch.float32, policy="dynamic")
    keep_limit(pipe, 1)
    free = pipe.plan_cache.plan(pipe.check(**call), call)
    limit = free.smallest_vram + 0.2 * (free.peak_vram - free.smallest_vram)
    plans = keep_limit(pipe, limit / 2**30)
    assert torch.equal(pipe(**call), expected)
    (plan,) = plans
    assert plan.peak_vram <= limit < free.peak_vram
    assert {"controlnet[0]", "controlnet[1]"} <= {each.role for stage in plan.loop for each in stage.components}


def test_calls_of_other_networks_have_plans_of_their_own(two):
    """They shared one, because a `ControlNetInput` counted by its type."""
    plans = keep_limit(two, 1)
    for index in (0, 1, 0):
        two.plan_cache.plan(two.check(), {**SMALL, "controlnet_inputs": ControlNetInput(index, image=EDGES)})
    two.plan_cache = None
    assert [plan.loop[0].roles for plan in plans] == [("dit", "controlnet[0]"), ("dit", "controlnet[1]")]


@pytest.mark.parametrize("cache", ["first_block:threshold=0", "taylor:interval=1"])
def test_a_step_cache_that_reuses_nothing_changes_no_bit(two, cache):
    call = {"prompt": "a", **SMALL, "controlnet_inputs": ControlNetInput(image=EDGES), "cfg_scale": 2.0}
    assert torch.equal(two(**call, step_cache=cache), two(**call))


def test_a_step_that_skips_layers_repeats_their_change_with_the_hints(two):
    """The hints were added a second time. The ControlNet runs in each of its steps, and layers are not skipped in the
    first step without it.
    """
    entered, left, counts, reused = [], [], [], []
    handles = [
        two.dit.layers[0].register_forward_pre_hook(lambda module, given: entered.append(given[0])),
        two.dit.layers[-1].register_forward_hook(lambda module, given, tokens: left.append(tokens)),
        two.controlnet[0].register_forward_hook(lambda *_: counts.append(len(left))),
    ]
    call = {**SMALL, "num_inference_steps": 6, "controlnet_inputs": ControlNetInput(image=EDGES, end=0.5)}
    cache = "taylor:interval=10,order=0,warmup_steps=1"
    two("a", **call, step_cache=cache, on_step=lambda step: reused.append(bool(step.reused)))
    for handle in handles:
        handle.remove()
    assert reused == [False, True, True, False, True, False]
    assert counts == [0, 0, 1, 1, 2, 2]
    changes = [after - before for before, after in zip(entered, left, strict=True)]
    for whole, skipped in ((0, 1), (0, 2), (3, 4)):
        assert relative_error(changes[skipped], changes[whole]) < 1e-6


def share_branches(rank: int) -> tuple[bool, int]:
    pipe, _ = tiny_pipelines(controlnet=controlnet("2.1"))
    call = {"prompt": "a red apple", "negative_prompt": "blurry", "cfg_scale": 2.0, **SMALL}
    call["controlnet_inputs"] = ControlNetInput(image=EDGES, end=0.5)
    alone, passes = pipe(**call), []
    pipe.controlnet[0].register_forward_hook(lambda *_: passes.append(1))
    return torch.equal(pipe.parallel(cfg=2)(**call), alone), len(passes)


def test_two_processes_share_the_branches_of_guidance():
    """Each runs the ControlNet for its own branch, twice in each of two steps."""
    assert run_together(2, share_branches) == [(True, 4), (True, 4)]


def test_a_lora_changes_one_of_them(two):
    network = two.controlnet[1]
    name = next(key for key in network.state_dict() if key.endswith("attention.to_q.weight"))
    stem, width = name.removesuffix(".weight"), network.config.dim
    lora = {f"{stem}.lora_A.weight": torch.ones(2, width), f"{stem}.lora_B.weight": torch.ones(width, 2)}
    call = {**SMALL, "controlnet_inputs": ControlNetInput(image=PHOTO, controlnet_id=1)}
    before = two("a red apple", **call)
    two.load_lora(network, state_dict=lora, hotload=True)
    assert [each.role for each in two.loras] == ["controlnet[1]"]
    assert not torch.equal(two("a red apple", **call), before)
    two.clear_lora()
    assert torch.equal(two("a red apple", **call), before)


@pytest.mark.parametrize(
    ("inputs", "error", "message"),
    [
        ("edges.png", TypeError, "expected ControlNetInput"),
        (ControlNetInput(), ValueError, "neither image nor inpaint_image"),
        (ControlNetInput(image="edges.png"), TypeError, "image='edges.png': expected a PIL image"),
        (ControlNetInput(inpaint_image=PHOTO), ValueError, "pass both"),
        (ControlNetInput(image=EDGES, controlnet_id=2), ValueError, "controlnet_id=2, and 2 are loaded"),
        (
            ControlNetInput(inpaint_image=PHOTO, inpaint_mask=MASK, controlnet_id=1),
            ValueError,
            "ControlNet 1 takes a condition image only",
        ),
    ],
)
def test_what_does_not_fit_is_refused_before_anything_runs(two, inputs, error, message):
    with pytest.raises(error, match=message):
        two.check(prompt="a red apple", controlnet_inputs=inputs)


def test_without_a_controlnet_its_argument_is_refused():
    pipe, _ = tiny_pipelines()
    with pytest.raises(MissingComponent, match="'controlnet_inputs' needs controlnet"):
        pipe("a red apple", controlnet_inputs=ControlNetInput(image=EDGES))


@pytest.fixture
def nano_controlnet(tmp_path):
    """A file with a ControlNet for z-image-nano; the current folder is that of the file."""
    config = diffsynth.load("z-image-nano", device="cpu").dit.config
    wanted = ZImageControlNetConfig(
        dim=config.dim,
        n_heads=config.n_heads,
        n_kv_heads=config.n_kv_heads,
        in_channels=65,
        n_layers=2,
        n_refiner_layers=1,
    )
    network = ZImageControlNet(wanted)
    save_file(draw_weights(shapes_of(network), 1), tmp_path / "union.safetensors")
    EDGES.save(tmp_path / "edges.png")
    return tmp_path / "union.safetensors"


def program(*arguments: object):
    return CliRunner().invoke(group.program, [str(argument) for argument in arguments])


def test_the_command_line_adds_controlnets(nano_controlnet, monkeypatch):
    """Two files of one role, by `--component`, give the image of `components` in Python, and their plan counts both."""
    monkeypatch.chdir(nano_controlnet.parent)
    small = ("--height", 64, "--width", 64, "--steps", 1, "--device", "cpu", "--dtype", "float32")
    inputs = '[{"image": "edges.png"}, {"image": "edges.png", "controlnet_id": 1, "scale": 0.5}]'
    both = ("--component", f"controlnet={nano_controlnet}", "--component", "controlnet=union.safetensors")
    call = (*small, "--set", f"controlnet_inputs={inputs}")
    result = program("generate", "z-image-nano", "a cat", "-o", "a.png", "--seed", 3, *both, *call)
    assert result.exit_code == 0, result.output
    components = {"controlnet[0]": nano_controlnet, "controlnet[1]": nano_controlnet}
    pipe = diffsynth.load("z-image-nano", device="cpu", torch_dtype=torch.float32, components=components)
    given = [ControlNetInput(image=EDGES), ControlNetInput(image=EDGES, controlnet_id=1, scale=0.5)]
    image = pipe("a cat", height=64, width=64, num_inference_steps=1, seed=3, controlnet_inputs=given)
    assert np.array_equal(np.asarray(Image.open("a.png")), np.asarray(image))
    plain, planned = (
        json.loads(program("plan", "z-image-nano", *small, *extra, "--json").stdout)
        for extra in ((), (*both, "--set", f"controlnet_inputs={inputs}"))
    )
    more = planned["peak_ram"] - plain["peak_ram"]
    assert more >= 2 * sum(tensor.numel() * 4 for tensor in pipe.controlnet[0].parameters())


@pytest.mark.parametrize(
    ("component", "message"),
    [
        ("contolnet=union.safetensors", "no role of a module in ZImagePipeline; did you mean 'controlnet'?"),
        ("controlnet", "expected ROLE=FILE"),
        ("controlnet=gone.safetensors", "gone.safetensors"),
        ("vae=union.safetensors", "union.safetensors, a z_image_controlnet; the role takes flux_autoencoder"),
        ("vae[0]=union.safetensors", "no role of a module"),
    ],
)
@pytest.mark.parametrize("command", ["generate", "plan"])
def test_components_that_do_not_fit_are_told_before_anything_is_loaded(
    nano_controlnet, monkeypatch, command, component, message
):
    monkeypatch.chdir(nano_controlnet.parent)
    out = ("a cat", "-o", "a.png") if command == "generate" else ()
    result = program(command, "z-image-nano", *out, "--component", component, "--device", "cpu")
    assert result.exit_code == 2
    assert message in result.stderr
    assert not (nano_controlnet.parent / "a.png").exists()


def test_a_role_is_given_once(nano_controlnet):
    twice = ("--component", f"vae={nano_controlnet}", "--component", f"vae={nano_controlnet}")
    assert "vae is given twice" in program("plan", "z-image-nano", *twice).stderr
