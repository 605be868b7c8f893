"""FluxControlNet equals diffusers' network, and with FluxDiT its transformer."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from diffusers import FluxControlNetModel

import parity
from diffsynth_flux.flux1.config import TINY_CONTROLNET, TINY_DIT, FluxControlNetConfig
from diffsynth_flux.flux1.controlnet import ControlNetResiduals
from diffsynth_flux.flux1.dit import grid_positions, patchify, unpatchify
from diffsynth_flux.flux1.tiny import tiny_controlnet_inputs, tiny_dit_inputs
from flux1_oracles import load_tensors, oracle_controlnet, oracle_dit

CASES = {
    "union": {},
    "inpainting": {"control_channels": 68, "num_modes": 0, "n_single_blocks": 0, "n_double_blocks": 2},
    "without guidance": {"num_modes": 0, "guidance_embed": False, "n_single_blocks": 2},
}


def run_oracle(oracle: FluxControlNetModel, inputs, control, mode) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    samples = oracle(
        hidden_states=inputs.patches,
        controlnet_cond=patchify(control),
        controlnet_mode=None if mode is None else torch.full((len(control), 1), mode),
        encoder_hidden_states=inputs.prompt_embeds,
        pooled_projections=inputs.pooled_prompt_embeds,
        timestep=inputs.sigma,
        img_ids=grid_positions(3, 5),
        txt_ids=torch.zeros(inputs.prompt_embeds.shape[1], 3),
        guidance=inputs.guidance,
        return_dict=False,
    )
    return [each or [] for each in samples]


def hints_of(config: FluxControlNetConfig):
    oracle = oracle_controlnet(config)
    found, ours = load_tensors(oracle.state_dict())
    assert (found.architecture.name, found.config) == ("flux_controlnet", config)
    inputs = tiny_controlnet_inputs(config, torch.Generator().manual_seed(0))
    return ours, oracle, inputs


@pytest.mark.parametrize("case", CASES)
@torch.no_grad()
def test_hints_equal_diffusers(case: str) -> None:
    ours, oracle, inputs = hints_of(replace(TINY_CONTROLNET, **CASES[case]))
    hints = ours(**inputs)
    for found, expected in zip(hints.values(), run_oracle(oracle, **inputs), strict=True):
        assert len(found) == len(expected)
        for hint, sample in zip(found, expected, strict=True):
            assert parity.relative_error(hint, sample) <= parity.TOLERANCE


def test_every_parameter_matters() -> None:
    """Every parameter changes a hint, except those after the last one."""
    _, oracle, inputs = hints_of(TINY_CONTROLNET)
    run = lambda: torch.cat([hint for stack in run_oracle(oracle, **inputs) for hint in stack], dim=1)  # noqa: E731
    assert parity.neutral_parameters(oracle, run) == []


@pytest.mark.parametrize("blocks", [(2, 2), (3, 5)])
@torch.no_grad()
def test_the_transformer_adds_them_as_diffusers_does(blocks) -> None:
    """A hint is added after several consecutive blocks."""
    config = replace(TINY_DIT, n_double_blocks=blocks[0], n_single_blocks=blocks[1])
    oracle, controlnet = oracle_dit(config), oracle_controlnet(replace(TINY_CONTROLNET, n_single_blocks=2))
    ours, network = load_tensors(oracle.state_dict())[1], load_tensors(controlnet.state_dict())[1]
    inputs = tiny_dit_inputs(config, torch.Generator().manual_seed(0))
    control = torch.randn(1, 16, 6, 10, generator=torch.Generator().manual_seed(1))
    found = ours(**inputs, extensions=[ControlNetResiduals(network, control, 0.7, mode=2)])
    stream = ours.embed(**inputs)
    double, single = run_oracle(controlnet, stream.inputs, control.expand(2, -1, -1, -1), 2)
    patches = oracle(
        stream.inputs.patches,
        inputs["prompt_embeds"],
        inputs["pooled_prompt_embeds"],
        inputs["sigma"],
        grid_positions(3, 5),
        torch.zeros(7, 3),
        inputs["guidance"],
        controlnet_block_samples=[each * 0.7 for each in double],
        controlnet_single_block_samples=[each * 0.7 for each in single],
        return_dict=False,
    )[0]
    assert parity.relative_error(found, unpatchify(patches, 3)) <= parity.TOLERANCE
    assert parity.relative_error(ours(**inputs), found) > 1e-3


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"control": torch.zeros(1, 17, 6, 10)}, "takes b c h w with 16 channels: 16 of control latents"),
        ({"control": torch.zeros(1, 16, 6, 8)}, "encode a control image of the size of the result"),
        ({"mode": None}, "mode=None: this ControlNet takes an integer from 0 to 2"),
        ({"mode": 3}, "mode=3: this ControlNet takes an integer from 0 to 2"),
    ],
)
def test_what_does_not_fit_is_refused(changes, message) -> None:
    ours, _, inputs = hints_of(TINY_CONTROLNET)
    with pytest.raises(ValueError, match=message):
        ours(**{**inputs, **changes})
