"""FluxDiT equals diffusers' network, from files with the names of diffusers and of the original code."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from diffusers.loaders.single_file_utils import convert_flux_transformer_checkpoint_to_diffusers

import parity
from diffsynth.core.loader import convert
from diffsynth.core.loader.layouts import layout_of
from diffsynth.core.loader.reader.ops import apply_rule
from diffsynth_flux.flux1.checkpoints import CHECKPOINTS
from diffsynth_flux.flux1.config import TINY_DIT, FluxDiTConfig
from diffsynth_flux.flux1.convert import DIFFUSERS
from diffsynth_flux.flux1.dit import FluxDiT
from flux1_oracles import load_tensors, oracle_dit, run_oracle

# Config fields, then latent height and width, and the batch size. 6x10 latent pixels are a grid of 3x5 tokens.
CASES = {
    "dev": ({}, (6, 10), 2),
    "without guidance": ({"guidance_embed": False}, (10, 6), 1),
    "condition latents": ({"in_channels": 128}, (4, 2), 2),
    "fill": ({"in_channels": 384}, (2, 6), 1),
    "deeper": ({"n_double_blocks": 1, "n_single_blocks": 3, "n_heads": 1}, (14, 18), 1),
}


def draw_inputs(config: FluxDiTConfig, size: tuple[int, int], batch: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(2)
    channels = config.condition_channels
    return {
        "latents": torch.randn(batch, config.latent_channels, *size, generator=generator),
        "sigma": torch.linspace(0.8, 0.15, batch),
        "prompt_embeds": torch.randn(batch, 7, config.context_dim, generator=generator),
        "pooled_prompt_embeds": torch.randn(batch, config.pooled_dim, generator=generator),
        "guidance": torch.linspace(3.5, 2.0, batch) if config.guidance_embed else None,
        "condition_latents": torch.randn(batch, channels, *size, generator=generator) if channels else None,
    }


@pytest.mark.parametrize("case", CASES)
@torch.no_grad()
def test_equals_diffusers(case: str) -> None:
    fields, size, batch = CASES[case]
    config = replace(TINY_DIT, **fields)
    oracle = oracle_dit(config)
    found, ours = load_tensors(oracle.state_dict())
    assert (found.checkpoint.name, found.config) == ("flux_dit/diffusers", config)
    inputs = draw_inputs(config, size, batch)
    assert parity.relative_error(ours(**inputs), run_oracle(oracle, inputs)) <= parity.TOLERANCE


def test_every_parameter_matters() -> None:
    """Every parameter changes the output, so the comparisons above cover all of them."""
    oracle = oracle_dit(TINY_DIT)
    inputs = draw_inputs(TINY_DIT, (6, 10), 2)
    assert parity.neutral_parameters(oracle, lambda: run_oracle(oracle, inputs)) == []


@torch.no_grad()
def test_bf16_is_as_good_as_the_oracles() -> None:
    oracle = oracle_dit(TINY_DIT)
    _, ours = load_tensors(oracle.state_dict(), torch.bfloat16)
    inputs = draw_inputs(TINY_DIT, (14, 10), 2)
    truth = run_oracle(oracle, inputs)
    exact = ("sigma", "guidance", "condition_latents")
    lowered = {name: x if name in exact else x.bfloat16() for name, x in inputs.items()}
    theirs = parity.relative_error(run_oracle(oracle.bfloat16(), lowered), truth)
    assert parity.relative_error(ours(**lowered), truth) <= 1.5 * theirs


@pytest.mark.parametrize("prefix", ["", "model.diffusion_model."])
def test_the_original_names_are_our_own(prefix: str) -> None:
    torch.manual_seed(0)
    state = FluxDiT(TINY_DIT).state_dict()
    found, ours = load_tensors({f"{prefix}{key}": tensor for key, tensor in state.items()})
    assert (found.checkpoint.name, found.prefix, found.config) == ("flux_dit", prefix, TINY_DIT)
    assert all(torch.equal(tensor, state[key]) for key, tensor in ours.state_dict().items())


def test_rules_undo_diffusers_converter() -> None:
    """The converter knows the width 3072 only, so matrices here have one column; one block of each kind is enough."""
    published = layout_of(CHECKPOINTS[0])
    original = {
        key: torch.randn(shape[0], *[1] * (len(shape) - 1))
        for key, shape in published.items()
        if "blocks." not in key or "_blocks.0." in key
    }
    theirs = convert_flux_transformer_checkpoint_to_diffusers(dict(original))
    plan = convert.plan(DIFFUSERS, {key: tuple(tensor.shape) for key, tensor in theirs.items()})
    back = {
        key: apply_rule(target.rule, tuple(theirs[each] for each in target.sources), target.index)
        for key, target in plan.targets.items()
    }
    assert back.keys() == original.keys()
    assert all(torch.equal(back[key], original[key]) for key in original)
