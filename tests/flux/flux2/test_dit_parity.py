"""Flux2DiT equals diffusers' network (0.42), which has the same key names."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from diffusers import Flux2Transformer2DModel

import parity
from diffsynth_flux.flux2.config import TINY_DIT, Flux2DiTConfig
from diffsynth_flux.flux2.dit import Flux2DiT
from diffsynth_flux.flux2.extension import image_positions, text_positions
from diffsynth_flux.flux2.features.edit import References
from flux2_oracles import oracle_dit

DEV = replace(TINY_DIT, in_channels=16, prompt_dim=24)
KLEIN = replace(DEV, embeds_guidance=False, n_layers=1, n_single_layers=3)
CONFIGS = {"dev": DEV, "klein": KLEIN}
SIZES = {"square": (4, 4), "odd": (5, 3), "one token": (1, 1)}


def build_pair(config: Flux2DiTConfig) -> tuple[Flux2DiT, Flux2Transformer2DModel]:
    oracle, ours = oracle_dit(config), Flux2DiT(config).eval()
    weights = parity.draw_weights(parity.shapes_of(oracle))
    oracle.load_state_dict(weights)
    ours.load_state_dict(weights, assign=True)
    return ours, oracle


def draw_inputs(config: Flux2DiTConfig, size: tuple[int, int], batch: int = 2) -> dict[str, torch.Tensor | None]:
    generator = torch.Generator().manual_seed(2)
    return {
        "latents": torch.randn(batch, config.in_channels, *size, generator=generator),
        "sigma": torch.linspace(0.15, 0.85, batch),
        "prompt_embeds": torch.randn(batch, 7, config.prompt_dim, generator=generator),
        "guidance": torch.linspace(4.0, 2.5, batch) if config.embeds_guidance else None,
    }


def run_oracle(
    oracle: Flux2Transformer2DModel, inputs: dict[str, torch.Tensor | None], references: tuple[torch.Tensor, ...] = ()
) -> torch.Tensor:
    latents, prompt = inputs["latents"], inputs["prompt_embeds"]
    batch, channels, *size = latents.shape
    tokens = [image.expand(batch, -1, -1, -1).flatten(2).mT for image in (latents, *references)]
    ids = [
        image_positions((image.shape[2], image.shape[3]), time=10 * index)
        for index, image in enumerate((latents, *references))
    ]
    out = oracle(
        hidden_states=torch.cat(tokens, dim=1),
        encoder_hidden_states=prompt,
        timestep=inputs["sigma"],
        img_ids=torch.cat(ids)[None],
        txt_ids=text_positions(prompt.shape[1])[None],
        guidance=inputs["guidance"],
        return_dict=False,
    )[0]
    return out[:, : size[0] * size[1]].mT.reshape(batch, channels, *size)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("model", CONFIGS)
@torch.no_grad()
def test_equals_diffusers(model: str, size: str) -> None:
    ours, oracle = build_pair(CONFIGS[model])
    inputs = draw_inputs(CONFIGS[model], SIZES[size])
    assert parity.relative_error(ours(**inputs), run_oracle(oracle, inputs)) <= parity.TOLERANCE


@torch.no_grad()
def test_reference_images_equal_diffusers() -> None:
    ours, oracle = build_pair(DEV)
    inputs = draw_inputs(DEV, (5, 3))
    references = (torch.randn(1, DEV.in_channels, 2, 6), torch.randn(1, DEV.in_channels, 3, 3))
    truth = run_oracle(oracle, inputs, references)
    assert parity.relative_error(ours(**inputs, extensions=(References(references),)), truth) <= parity.TOLERANCE
    assert parity.relative_error(ours(**inputs), truth) > 1e-2


@pytest.mark.parametrize("model", CONFIGS)
def test_every_parameter_matters(model: str) -> None:
    """Every parameter changes the output, so the comparisons above cover all of them."""
    _, oracle = build_pair(CONFIGS[model])
    inputs = draw_inputs(CONFIGS[model], (5, 3))
    assert parity.neutral_parameters(oracle, lambda: run_oracle(oracle, inputs)) == []


@torch.no_grad()
def test_bf16_is_as_good_as_the_oracles() -> None:
    ours, oracle = build_pair(DEV)
    inputs = draw_inputs(DEV, (5, 3))
    truth = run_oracle(oracle, inputs)
    lowered = {name: x.bfloat16() if name in ("latents", "prompt_embeds") else x for name, x in inputs.items()}
    theirs = parity.relative_error(run_oracle(oracle.bfloat16(), lowered), truth)
    assert parity.relative_error(ours.bfloat16()(**lowered), truth) <= 1.5 * theirs
