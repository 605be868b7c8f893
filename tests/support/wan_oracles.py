"""Tiny Wan networks of diffusers and transformers, and ours with the same weights, loaded by the key rules."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from diffusers import (
    AutoencoderKLWan,
    FlowMatchEulerDiscreteScheduler,
    WanAnimateTransformer3DModel,
    WanTransformer3DModel,
    WanVACETransformer3DModel,
)
from torch import nn
from transformers import UMT5Config, UMT5EncoderModel

from diffsynth_wan.config import Wan22AutoencoderConfig
from diffsynth_wan.tiny import VOCAB_SIZE, tiny_tokenizer
from parity import draw_weights, shapes_of
from published_tensors import load_components, load_published

TEXT_DIM, IMAGE_DIM = 24, 80
SHIFT = 5.0

DIT = {
    "num_attention_heads": 2,
    "attention_head_dim": 128,
    "in_channels": 16,
    "out_channels": 16,
    "text_dim": TEXT_DIM,
    "freq_dim": 32,
    "ffn_dim": 96,
    "num_layers": 2,
    "rope_max_seq_len": 64,
}


class UniformScheduler(FlowMatchEulerDiscreteScheduler):
    """Return a scheduler with the published grid, from 1 down to 0 exclusive; diffusers' default ends at 1/1000."""

    def set_timesteps(self, num_inference_steps: int, device: Any = None) -> None:
        super().set_timesteps(sigmas=np.linspace(1, 0, num_inference_steps + 1)[:-1], device=device)


def drawn(module: nn.Module, seed: int) -> nn.Module:
    """Return the module with random weights, none of them neutral."""
    module.eval().load_state_dict(draw_weights(shapes_of(module), seed=seed))
    return module.requires_grad_(False)


def oracle_dit(seed: int = 0, **changed: Any) -> WanTransformer3DModel:
    """Return diffusers' transformer."""
    return drawn(WanTransformer3DModel(**DIT | changed), seed)


def our_dit(oracle: nn.Module) -> nn.Module:
    """Return our network with the oracle's weights."""
    return load_published(oracle.state_dict(), expect="wan_dit/t2v_14b_diffusers")


def oracle_vace_dit(seed: int = 0) -> WanVACETransformer3DModel:
    """Return diffusers' transformer with VACE."""
    return drawn(WanVACETransformer3DModel(**DIT, vace_layers=[0], vace_in_channels=96), seed)


def our_vace(oracle: nn.Module) -> tuple[nn.Module, nn.Module]:
    """Return our transformer and our VACE with the oracle's weights."""
    found = load_components(oracle.state_dict())
    return found["wan_dit/diffusers_with_vace"], found["wan_vace/diffusers"]


def oracle_vae(seed: int = 10) -> AutoencoderKLWan:
    """Return diffusers' autoencoder of Wan 2.1 with few channels."""
    return drawn(AutoencoderKLWan(base_dim=8), seed)


def our_vae(oracle: nn.Module) -> nn.Module:
    """Return our network with the oracle's weights."""
    return load_published(oracle.state_dict(), expect="wan_autoencoder/diffusers")


def oracle_vae_22(seed: int = 10) -> AutoencoderKLWan:
    """Return diffusers' autoencoder of Wan 2.2 with few channels."""
    facts = Wan22AutoencoderConfig()
    module = AutoencoderKLWan(
        base_dim=8,
        decoder_base_dim=8,
        z_dim=48,
        latents_mean=list(facts.latents_mean),
        latents_std=list(facts.latents_std),
        is_residual=True,
        in_channels=12,
        out_channels=12,
        patch_size=2,
        scale_factor_spatial=16,
    )
    return drawn(module, seed)


def our_vae_22(oracle: nn.Module) -> nn.Module:
    """Return our network with the oracle's weights."""
    return load_published(oracle.state_dict(), expect="wan22_autoencoder/diffusers")


def oracle_text_encoder(seed: int = 20) -> UMT5EncoderModel:
    """Return transformers' UMT5."""
    config = UMT5Config(
        vocab_size=VOCAB_SIZE,
        d_model=TEXT_DIM,
        d_kv=8,
        d_ff=32,
        num_layers=2,
        num_heads=2,
        feed_forward_proj="gated-gelu",
    )
    module = UMT5EncoderModel(config).eval()
    shapes = {name: tuple(value.shape) for name, value in module.named_parameters()}
    weights = draw_weights(shapes, seed=seed)
    weights["shared.weight"] *= TEXT_DIM**0.5
    module.load_state_dict(weights, strict=False)
    return module.requires_grad_(False)


def our_text_encoder(oracle: UMT5EncoderModel) -> nn.Module:
    """Return our network with the oracle's weights."""
    state = oracle.state_dict()
    state.pop("encoder.embed_tokens.weight", None)
    return load_published(state, expect="wan_text_encoder/transformers")


def shared_parts() -> tuple[dict[str, Any], dict[str, Any]]:
    """Return text encoder, tokenizer, autoencoder and scheduler of an oracle pipeline, and the components of ours."""
    text_encoder, vae, tokenizer = oracle_text_encoder(), oracle_vae(), tiny_tokenizer()
    theirs = {
        "text_encoder": text_encoder,
        "vae": vae,
        "tokenizer": tokenizer,
        "scheduler": UniformScheduler(num_train_timesteps=1000, shift=SHIFT),
    }
    ours = {"text_encoder": our_text_encoder(text_encoder), "vae": our_vae(vae), "tokenizer": tokenizer}
    return theirs, ours


def noise(seed: int, frames: int, height: int, width: int, *, channels: int = 16, factor: int = 8) -> torch.Tensor:
    """Return the noise that our pipeline generates for a seed."""
    generator = torch.Generator("cpu").manual_seed(seed)
    shape = (1, channels, (frames - 1) // 4 + 1, height // factor, width // factor)
    return torch.randn(shape, generator=generator)


def oracle_animate_dit(seed: int = 0) -> WanAnimateTransformer3DModel:
    """Return diffusers' narrow transformer with Animate; faces have 512 x 512 pixels, the only depth it supports."""
    widths = (3, 4, 4, 5, 6, 7, 8, 8)
    module = WanAnimateTransformer3DModel(
        **DIT | {"in_channels": 36},
        image_dim=IMAGE_DIM,
        added_kv_proj_dim=256,
        motion_encoder_channel_sizes={str(512 >> number): width for number, width in enumerate(widths)},
        motion_style_dim=12,
        motion_dim=5,
        motion_encoder_dim=14,
        face_encoder_hidden_dim=24,
        face_encoder_num_heads=2,
        inject_face_latents_blocks=2,
    ).eval()
    weights = draw_weights({name: tuple(value.shape) for name, value in module.named_parameters()}, seed=seed)
    for name, weight in weights.items():
        if name.startswith("motion_encoder.") and weight.ndim > 1:
            weight.mul_(weight[0].numel() ** 0.5)  # these layers divide by it in forward()
    module.load_state_dict(module.state_dict() | weights)
    return module.requires_grad_(False)


def our_animate(oracle: nn.Module) -> tuple[nn.Module, nn.Module]:
    """Return our transformer and our adapter with the oracle's weights."""
    found = load_components(oracle.state_dict())
    return found["wan_dit/diffusers_with_animate"], found["wan_animate_adapter/diffusers"]


def our_animate_2(oracle: nn.Module) -> nn.Module:
    """Return our transformer with the oracle's weights."""
    return load_published(oracle.state_dict(), expect="wan_dit/animate_2_diffusers")
