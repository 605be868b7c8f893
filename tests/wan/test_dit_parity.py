"""WanDiT equals diffusers' network: text, image, first and last frame, and one time per frame."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import parity
from diffsynth_wan.config import WanDiTConfig
from diffsynth_wan.dit import WanDiT
from wan_networks import SMALL, build_pair, draw, load_published, meta, to_diffusers

CONFIGS = {
    "t2v": WanDiTConfig(**SMALL),
    "i2v": WanDiTConfig(**SMALL, in_channels=36, image_dim=80),
    "i2v without image branch": WanDiTConfig(**SMALL, in_channels=36),
    "flf2v": WanDiTConfig(**SMALL, in_channels=36, image_dim=80, image_tokens=14),
    "ti2v": WanDiTConfig(**SMALL, in_channels=48, out_channels=48, frame_times=True),
}
# Latent frames, height and width: odd numbers of tokens, more than one along each axis.
SIZES = {"one frame": (1, 6, 4), "video": (3, 6, 10)}
DIFFUSERS_PROMPT_TOKENS = 512
"""diffusers takes the last 512 tokens for the prompt and those before for the image."""


def draw_inputs(config: WanDiTConfig, size: tuple[int, int, int], batch: int = 2) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(2)
    tokens = DIFFUSERS_PROMPT_TOKENS if config.image_dim else 11
    inputs = {
        "latents": torch.randn(batch, config.out_channels, *size, generator=generator),
        "time": torch.linspace(0.15, 0.85, batch),
        "prompt_embeds": torch.randn(batch, tokens, config.text_dim, generator=generator),
    }
    if config.in_channels > config.out_channels:
        channels = config.in_channels - config.out_channels
        inputs["condition_latents"] = torch.randn(batch, channels, *size, generator=generator)
    if config.image_dim:
        inputs["image_embeds"] = torch.randn(batch, config.image_tokens or 7, config.image_dim, generator=generator)
    if config.frame_times:
        inputs["time"] = inputs["time"][:, None].expand(-1, size[0]).clone()
        inputs["time"][:, 0] = 0
    return inputs


def run_oracle(oracle: Any, config: WanDiTConfig, inputs: dict[str, Tensor]) -> Tensor:
    latents, time, image = inputs["latents"], inputs["time"], inputs.get("image_embeds")
    if time.ndim == 2:  # a time for every token
        time = time.repeat_interleave(latents.shape[3] * latents.shape[4] // 4, dim=1)
    if "condition_latents" in inputs:
        latents = torch.cat((latents, inputs["condition_latents"]), dim=1)
    if image is not None and config.image_tokens:  # each of the two images is a row of the batch
        image = image.unflatten(1, (2, -1)).flatten(0, 1)
    return oracle(latents, 1000 * time, inputs["prompt_embeds"], image, return_dict=False)[0]


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("case", CONFIGS)
@torch.no_grad()
def test_equals_diffusers(case: str, size: str) -> None:
    config = CONFIGS[case]
    ours, oracle = build_pair(config)
    assert ours.config == config
    inputs = draw_inputs(config, SIZES[size])
    assert parity.relative_error(ours(**inputs), run_oracle(oracle, config, inputs)) <= parity.TOLERANCE


@pytest.mark.parametrize("case", CONFIGS)
def test_every_parameter_matters(case: str) -> None:
    """Every parameter changes the output, so the comparisons above cover all of them."""
    config = CONFIGS[case]
    _, oracle = build_pair(config)
    inputs = draw_inputs(config, (2, 2, 6), batch=1)
    assert parity.neutral_parameters(oracle, lambda: run_oracle(oracle, config, inputs)) == []


@pytest.mark.parametrize("case", ["t2v", "i2v", "ti2v"])
@torch.no_grad()
def test_bf16_is_as_good_as_the_oracles(case: str) -> None:
    config = CONFIGS[case]
    ours, oracle = build_pair(config)
    inputs = draw_inputs(config, (3, 4, 6))
    truth = run_oracle(oracle, config, inputs)
    lowered = {name: x if name == "time" else x.bfloat16() for name, x in inputs.items()}
    theirs = parity.relative_error(run_oracle(oracle.bfloat16(), config, lowered), truth)
    assert parity.relative_error(ours.bfloat16()(**lowered), truth) <= 1.5 * theirs


@torch.no_grad()
def test_a_time_per_token_is_a_time_per_frame() -> None:
    config = CONFIGS["ti2v"]
    ours, oracle = build_pair(config)
    inputs = draw_inputs(config, (3, 4, 6))
    generator = torch.Generator().manual_seed(3)
    per_token = torch.rand(2, 18, generator=generator)
    latents, prompt = inputs["latents"], inputs["prompt_embeds"]
    truth = oracle(latents, 1000 * per_token, prompt, return_dict=False)[0]
    assert parity.relative_error(ours(latents, per_token, prompt), truth) <= parity.TOLERANCE


@pytest.mark.parametrize("case", CONFIGS)
@pytest.mark.parametrize("prefix", ["", "model.diffusion_model.", "model."])
def test_the_layout_of_diffusers_loads_to_the_bit(case: str, prefix: str) -> None:
    published = draw(meta(WanDiT, CONFIGS[case]))
    theirs = {f"{prefix}{name}": tensor for name, tensor in to_diffusers(published).items()}
    loaded = load_published(theirs)["wan_dit"]
    assert loaded.config == CONFIGS[case]
    assert all(torch.equal(tensor, published[name]) for name, tensor in loaded.state_dict().items())
