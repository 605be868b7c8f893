"""ControlNets in whole calls: against diffusers, by step, several at once, with Kontext, and refusals."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from diffusers import FluxControlNetModel, FluxControlNetPipeline, FluxMultiControlNetModel

from diffsynth.errors import MissingComponent
from diffsynth.runtime.controlnet import ControlNetInput
from diffsynth_flux.flux1.config import FluxControlNetConfig
from diffsynth_flux.flux1.dit import patchify
from flux1_oracles import (
    DIT,
    SIZE,
    load_tensors,
    noise,
    oracle_controlnet,
    random_image,
    sigmas,
    tiny_pipelines,
    unpacked,
)
from parity import TOLERANCE, relative_error
from posterior import encode_to_the_mean

SIZES = {name: getattr(DIT, name) for name in ("dim", "n_heads", "context_dim", "pooled_dim")}
UNION = FluxControlNetConfig(**SIZES, n_double_blocks=1, n_single_blocks=1, num_modes=7)
DEPTH = replace(UNION, n_single_blocks=0, num_modes=0)
INPAINT = replace(DEPTH, control_channels=68)
EDGES, PHOTO, MASK = random_image(1), random_image(2), random_image(3, "L")
CALL = {"prompt": "a red apple", **SIZE}
GIVEN = {"num_inference_steps": 4, "seed": 7, "output_type": "latents", "t5_sequence_length": 64}
SMALL = {
    "prompt": "a",
    "height": 32,
    "width": 48,
    "num_inference_steps": 3,
    "seed": 0,
    "output_type": "latents",
    "t5_sequence_length": 16,
}


@pytest.fixture(scope="module")
def setting():
    """Our pipeline with three ControlNets, diffusers' components, and its ControlNets."""
    oracles = [oracle_controlnet(config, seed) for seed, config in enumerate((UNION, DEPTH, INPAINT), start=4)]
    ours, parts = tiny_pipelines(controlnet=[load_tensors(each.state_dict())[1] for each in oracles])
    return ours, parts, oracles


def oracle_images(parts, controlnet: FluxControlNetModel, **arguments):
    pipe = FluxControlNetPipeline(**parts, controlnet=controlnet)
    pipe.set_progress_bar_config(disable=True)
    common = {"sigmas": sigmas(4), "latents": noise(7), "output_type": "latent", "max_sequence_length": 64}
    return unpacked(pipe(**CALL, **common, guidance_scale=3.5, **arguments).images)


def test_a_union_mode(setting, monkeypatch):
    encode_to_the_mean(monkeypatch)
    ours, parts, oracles = setting
    expected = oracle_images(parts, oracles[0], control_image=EDGES, control_mode=4, controlnet_conditioning_scale=0.6)
    inputs = ControlNetInput(image=EDGES, scale=0.6, processor_id="pose")
    found = ours(**CALL, **GIVEN, controlnet_inputs=inputs)
    assert relative_error(found, expected) < TOLERANCE
    assert relative_error(ours(**CALL, **GIVEN), found) > 1e-3
    other = ours(**CALL, **GIVEN, controlnet_inputs=replace(inputs, processor_id=1))
    assert relative_error(other, found) > 1e-4


def test_two_at_once(setting, monkeypatch):
    encode_to_the_mean(monkeypatch)
    parts = setting[1]
    plain = [oracle_controlnet(DEPTH, seed) for seed in (8, 9)]
    pipe, _ = tiny_pipelines(controlnet=[load_tensors(each.state_dict())[1] for each in plain])
    expected = oracle_images(
        parts,
        FluxMultiControlNetModel(plain),
        control_image=[EDGES, PHOTO],
        control_mode=[0, 0],
        controlnet_conditioning_scale=[0.6, 0.4],
    )
    inputs = [ControlNetInput(image=EDGES, scale=0.6), ControlNetInput(image=PHOTO, scale=0.4, controlnet_id=1)]
    assert relative_error(pipe(**CALL, **GIVEN, controlnet_inputs=inputs), expected) < TOLERANCE


def test_an_image_to_inpaint(setting, monkeypatch):
    """Control latents of the image in black where it changes, and the mask of what is kept: given as they are.

    diffusers' pipeline encodes a control image only, and has no argument for a mask: so the first layer of its
    ControlNet is called with ours.
    """
    ours, parts, oracles = setting
    inputs = ControlNetInput(image=PHOTO, inpaint_mask=MASK, controlnet_id=2, scale=0.9)
    found = ours(**CALL, **GIVEN, controlnet_inputs=inputs)
    black = torch.from_numpy(np.array(PHOTO)).permute(2, 0, 1)[None] / 127.5 - 1
    changes = torch.from_numpy(np.array(MASK))[None, None] / 255 >= 0.5
    black = torch.where(changes, -torch.ones(()), black)
    with torch.no_grad():
        mean = parts["vae"].encode(black).latent_dist.mode()
    mean = (mean - parts["vae"].config.shift_factor) * parts["vae"].config.scaling_factor
    kept = torch.nn.functional.interpolate((~changes).float(), size=mean.shape[2:])
    packed = patchify(torch.cat((mean, kept), dim=1))
    monkeypatch.setattr(oracles[2], "controlnet_x_embedder", _Given(oracles[2].controlnet_x_embedder, packed))
    expected = oracle_images(parts, oracles[2], control_image=PHOTO, controlnet_conditioning_scale=0.9)
    assert relative_error(found, expected) < TOLERANCE


class _Given(torch.nn.Module):
    """A layer that is called with a given input instead of its own."""

    def __init__(self, layer: torch.nn.Module, given: torch.Tensor) -> None:
        super().__init__()
        self.layer, self.given = layer, given

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layer(self.given)


def test_neutral_values_change_no_bit(setting):
    ours = setting[0]
    plain = ours(**SMALL)
    for inputs in (None, [], ControlNetInput(image=EDGES, scale=0, controlnet_id=1)):
        assert torch.equal(ours(**SMALL, controlnet_inputs=inputs), plain)


def test_only_the_steps_between_start_and_end_have_hints(setting):
    ours, seen = setting[0], [[], [], []]
    whole = ControlNetInput(image=EDGES, controlnet_id=1)
    for latents, inputs in zip(seen, (whole, replace(whole, end=0.6), None), strict=True):
        ours(**SMALL, controlnet_inputs=inputs, on_step=lambda step, to=latents: to.append(step.latents))
    assert [torch.equal(a, b) for a, b in zip(*seen[:2], strict=True)] == [True, False, False]
    assert not torch.equal(seen[1][0], seen[2][0])


def test_with_a_reference_image(setting):
    """The tokens of Kontext get no hint, and both have an effect."""
    ours = setting[0]
    inputs = ControlNetInput(image=EDGES, controlnet_id=1)
    both = ours(**SMALL, controlnet_inputs=inputs, kontext_images=PHOTO)
    for alone in ({"controlnet_inputs": inputs}, {"kontext_images": PHOTO}):
        assert relative_error(ours(**SMALL, **alone), both) > 1e-3


def test_roles_follow_the_steps(setting):
    inputs = [ControlNetInput(image=EDGES, controlnet_id=1, end=0.6), ControlNetInput(image=PHOTO, processor_id=0)]
    plan = setting[0].plan(**SMALL, controlnet_inputs=inputs, device="cuda")
    assert [(set(stage.roles), stage.steps) for stage in plan.loop] == [
        ({"dit", "controlnet[0]", "controlnet[1]"}, 1),
        ({"dit", "controlnet[0]"}, 2),
    ]


@pytest.mark.parametrize(
    ("inputs", "error", "message"),
    [
        ("edges.png", TypeError, "expected ControlNetInput"),
        (ControlNetInput(), ValueError, "needs one of image and inpaint_image"),
        (ControlNetInput(image="edges.png"), TypeError, "image='edges.png': expected a PIL image"),
        (ControlNetInput(image=EDGES), ValueError, "processor_id=None: a Union ControlNet needs the kind"),
        (ControlNetInput(image=EDGES, processor_id="cany"), ValueError, "did you mean 'canny'"),
        (ControlNetInput(image=EDGES, processor_id=7), ValueError, "ControlNet 0 has 7 kinds"),
        (ControlNetInput(image=EDGES, controlnet_id=3), ValueError, "controlnet_id=3, and 3 are loaded"),
        (ControlNetInput(image=EDGES, controlnet_id=2), ValueError, "ControlNet 2 needs inpaint_mask"),
        (ControlNetInput(image=EDGES, inpaint_mask=MASK, controlnet_id=1), ValueError, "without a mask"),
    ],
)
def test_what_does_not_fit_is_refused_before_anything_runs(setting, inputs, error, message):
    with pytest.raises(error, match=message):
        setting[0].check(prompt="a", controlnet_inputs=inputs)


def test_without_a_controlnet_its_argument_is_refused():
    pipe, _ = tiny_pipelines()
    with pytest.raises(MissingComponent, match="'controlnet_inputs' needs controlnet"):
        pipe("a", controlnet_inputs=ControlNetInput(image=EDGES))
