"""ZImageDiT equals diffusers' network, which has the same key names."""

from __future__ import annotations

import pytest
import torch
from diffusers import ZImageTransformer2DModel

import parity
from diffsynth_zimage.config import ZImageDiTConfig
from diffsynth_zimage.dit import ZImageDiT

SMALL = ZImageDiTConfig(
    dim=64, n_layers=2, n_refiner_layers=2, n_heads=4, n_kv_heads=4, cap_feat_dim=48, axes_dims=(4, 6, 6)
)
NANO = ZImageDiTConfig(
    dim=256, n_layers=1, n_refiner_layers=1, n_heads=4, n_kv_heads=4, cap_feat_dim=192, axes_dims=(16, 24, 24)
)
# Latent height and width, then the length of each prompt. 26x22 is a grid of 13x11 tokens (208x176 pixels).
CASES = {
    "one prompt": ((26, 22), [7]),
    "nothing to pad": ((16, 16), [32]),
    "two images, equal prompts": ((10, 6), [20, 20]),
    "prompts that pad to one multiple": ((26, 22), [3, 31]),
    "prompts that pad to different multiples": ((26, 22), [5, 70]),
    "longer first": ((4, 18), [64, 33, 1]),
}


def build_pair(config: ZImageDiTConfig) -> tuple[ZImageDiT, ZImageTransformer2DModel]:
    oracle = ZImageTransformer2DModel(
        in_channels=config.in_channels,
        dim=config.dim,
        n_layers=config.n_layers,
        n_refiner_layers=config.n_refiner_layers,
        n_heads=config.n_heads,
        n_kv_heads=config.n_kv_heads,
        cap_feat_dim=config.cap_feat_dim,
        axes_dims=list(config.axes_dims),
    ).eval()
    ours = ZImageDiT(config).eval()
    weights = parity.draw_weights(parity.shapes_of(oracle))
    oracle.load_state_dict(weights)
    ours.load_state_dict(weights, assign=True)
    return ours, oracle


def draw_inputs(config: ZImageDiTConfig, size: tuple[int, int], lengths: list[int]) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(2)
    batch = len(lengths)
    return {
        "latents": torch.randn(batch, config.in_channels, *size, generator=generator),
        "time": torch.linspace(0.15, 0.85, batch),
        "prompt_embeds": torch.randn(batch, max(lengths), config.cap_feat_dim, generator=generator),
        "prompt_mask": torch.arange(max(lengths)) < torch.tensor(lengths)[:, None],
    }


def run_oracle(oracle: ZImageTransformer2DModel, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
    prompts = [embeds[mask] for embeds, mask in zip(inputs["prompt_embeds"], inputs["prompt_mask"], strict=True)]
    images = list(inputs["latents"].unsqueeze(2))
    return torch.stack(oracle(images, inputs["time"], prompts, return_dict=False)[0]).squeeze(2)


@pytest.mark.parametrize("case", CASES)
@torch.no_grad()
def test_equals_diffusers(case: str) -> None:
    ours, oracle = build_pair(SMALL)
    inputs = draw_inputs(SMALL, *CASES[case])
    assert parity.relative_error(ours(**inputs), run_oracle(oracle, inputs)) <= parity.TOLERANCE


@torch.no_grad()
def test_equals_diffusers_at_the_shape_of_nano() -> None:
    ours, oracle = build_pair(NANO)
    inputs = draw_inputs(NANO, (16, 16), [9, 12])
    assert parity.relative_error(ours(**inputs), run_oracle(oracle, inputs)) <= parity.TOLERANCE


def test_every_parameter_matters() -> None:
    """Every parameter changes the output, so the comparisons above cover all of them."""
    _, oracle = build_pair(SMALL)
    inputs = draw_inputs(SMALL, (10, 6), [5, 40])
    assert parity.neutral_parameters(oracle, lambda: run_oracle(oracle, inputs)) == []


@torch.no_grad()
def test_bf16_is_as_good_as_the_oracles() -> None:
    ours, oracle = build_pair(SMALL)
    inputs = draw_inputs(SMALL, (26, 22), [5, 70])
    truth = run_oracle(oracle, inputs)
    lowered = {name: x.bfloat16() if name in ("latents", "prompt_embeds") else x for name, x in inputs.items()}
    theirs = parity.relative_error(run_oracle(oracle.bfloat16(), lowered), truth)
    assert parity.relative_error(ours.bfloat16()(**lowered), truth) <= 1.5 * theirs


@torch.no_grad()
def test_padding_may_stand_on_the_left() -> None:
    ours, oracle = build_pair(SMALL)
    inputs = draw_inputs(SMALL, (10, 6), [5, 40])
    truth = run_oracle(oracle, inputs)
    inputs["prompt_embeds"][0] = inputs["prompt_embeds"][0].roll(35, dims=0)
    inputs["prompt_mask"][0] = inputs["prompt_mask"][0].roll(35, dims=0)
    assert parity.relative_error(ours(**inputs), truth) <= parity.TOLERANCE
