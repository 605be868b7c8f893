"""QwenImageDiT equals diffusers' network (0.42), which has the same key names."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from diffusers import QwenImageTransformer2DModel
from einops import rearrange
from torch import Tensor

import parity
from diffsynth_qwen_image.config import TINY_DIT, QwenImageDiTConfig
from diffsynth_qwen_image.dit import QwenImageDiT
from diffsynth_qwen_image.features.layers import LayerInput
from qwen_image_oracles import oracle_dit

CONFIG = replace(TINY_DIT, in_channels=4, prompt_dim=24)
LAYERED = replace(CONFIG, layered=True)
SIZES = {"square": (8, 8), "odd": (10, 6), "one token": (2, 2)}
OTHERS = ((1, 4, 4, 12), (1, 4, 6, 6))
"""Shapes of the latents of two reference images."""


def build_pair(
    config: QwenImageDiTConfig, *, zero_cond_t: bool = False
) -> tuple[QwenImageDiT, QwenImageTransformer2DModel]:
    oracle, ours = oracle_dit(config, zero_cond_t=zero_cond_t), QwenImageDiT(config).eval()
    weights = parity.draw_weights(parity.shapes_of(oracle))
    oracle.load_state_dict(weights)
    ours.load_state_dict(weights, assign=True)
    return ours, oracle


def draw_inputs(config: QwenImageDiTConfig, size: tuple[int, ...], *, padded: bool = True) -> dict[str, Tensor | None]:
    generator = torch.Generator().manual_seed(2)
    mask = torch.arange(7)[None, :] < torch.tensor([[7], [4]])
    return {
        "latents": torch.randn(2, config.in_channels, *size, generator=generator),
        "sigma": torch.tensor([0.15, 0.85]),
        "prompt_embeds": torch.randn(2, 7, config.prompt_dim, generator=generator),
        "prompt_mask": mask if padded else None,
    }


def patches(latents: Tensor) -> Tensor:
    return rearrange(latents, "b c (h p) (w q) -> b (h w) (c p q)", p=2, q=2)


def run_oracle(
    oracle: QwenImageTransformer2DModel, inputs: dict[str, Tensor | None], references: tuple[Tensor, ...] = ()
) -> Tensor:
    latents = inputs["latents"]
    layers = list(latents.unbind(2)) if latents.ndim == 5 else [latents]
    images = [*layers, *(reference.expand(2, -1, -1, -1) for reference in references)]
    out = oracle(
        hidden_states=torch.cat([patches(image) for image in images], dim=1),
        encoder_hidden_states=inputs["prompt_embeds"],
        encoder_hidden_states_mask=inputs["prompt_mask"],
        timestep=inputs["sigma"],
        img_shapes=[[(1, image.shape[2] // 2, image.shape[3] // 2) for image in images]] * 2,
        additional_t_cond=torch.zeros(2, dtype=torch.long) if latents.ndim == 5 else None,
        return_dict=False,
    )[0]
    height, width = latents.shape[-2:]
    out = out[:, : len(layers) * height * width // 4]
    images = rearrange(out, "b (t h w) (c p q) -> b c t (h p) (w q)", h=height // 2, w=width // 2, p=2, q=2)
    return images.reshape(latents.shape)


@pytest.mark.parametrize("padded", [True, False])
@pytest.mark.parametrize("size", SIZES)
@torch.no_grad()
def test_equals_diffusers(size: str, padded: bool) -> None:
    ours, oracle = build_pair(CONFIG)
    inputs = draw_inputs(CONFIG, SIZES[size], padded=padded)
    assert parity.relative_error(ours(**inputs), run_oracle(oracle, inputs)) <= parity.TOLERANCE


@pytest.mark.parametrize("clean_time", [False, True])
@torch.no_grad()
def test_reference_images_equal_diffusers(clean_time: bool) -> None:
    ours, oracle = build_pair(CONFIG, zero_cond_t=clean_time)
    inputs = draw_inputs(CONFIG, (10, 6))
    references = tuple(torch.randn(*shape, generator=torch.Generator().manual_seed(3)) for shape in OTHERS)
    truth = run_oracle(oracle, inputs, references)

    def run(clean_time: bool) -> Tensor:
        def append(dit, stream):
            return dit.append_images(stream, references, clean_time=clean_time)

        return ours(**inputs, extensions=(append,))

    assert parity.relative_error(run(clean_time), truth) <= parity.TOLERANCE
    assert parity.relative_error(run(not clean_time), truth) > 1e-2
    assert parity.relative_error(ours(**inputs), truth) > 1e-2


@torch.no_grad()
def test_layers_equal_diffusers() -> None:
    """Three layers, and an image that is given; the text starts behind the last layer."""
    ours, oracle = build_pair(LAYERED)
    for size in ((3, 8, 6), (3, 2, 2)):
        inputs = draw_inputs(LAYERED, size)
        given = torch.randn(1, 4, *size[1:], generator=torch.Generator().manual_seed(3))
        truth = run_oracle(oracle, inputs, (given,))
        out = ours(**inputs, extensions=(LayerInput(given),))
        assert parity.relative_error(out, truth) <= parity.TOLERANCE


@pytest.mark.parametrize("config", [CONFIG, LAYERED])
def test_every_parameter_matters(config: QwenImageDiTConfig) -> None:
    """Every parameter changes the output, so the comparisons above cover all of them, except the text's tokens after
    the last attention, which nothing reads.
    """
    _, oracle = build_pair(config)
    layered = (torch.randn(1, 4, 8, 6, generator=torch.Generator().manual_seed(3)),) if config.layered else ()
    inputs = draw_inputs(config, (2, 8, 6) if config.layered else (10, 6))
    last = f"transformer_blocks.{config.n_layers - 1}"
    unread = ("attn.add_q_proj", "attn.norm_added_q", "attn.to_add_out", "txt_mlp")
    neutral = parity.neutral_parameters(oracle, lambda: run_oracle(oracle, inputs, layered))
    assert all(name.startswith(tuple(f"{last}.{part}" for part in unread)) for name in neutral), neutral


@torch.no_grad()
def test_bf16_is_as_good_as_the_oracles() -> None:
    ours, oracle = build_pair(CONFIG)
    inputs = draw_inputs(CONFIG, (10, 6))
    truth = run_oracle(oracle, inputs)
    lowered = {name: x.bfloat16() if name in ("latents", "prompt_embeds") else x for name, x in inputs.items()}
    theirs = parity.relative_error(run_oracle(oracle.bfloat16(), lowered), truth)
    assert parity.relative_error(ours.bfloat16()(**lowered), truth) <= 1.5 * theirs
