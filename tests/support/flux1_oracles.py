"""Tiny FLUX.1 networks of ours and of diffusers 0.42.1 with the same weights, carried over through published names."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from diffusers import FluxTransformer2DModel
from torch import Tensor, nn

from diffsynth import _discovery
from diffsynth.core.loader import component, pickled, recognize
from diffsynth_flux.flux1.config import FluxBlocksConfig, FluxDiTConfig
from parity import draw_weights, shapes_of


def load_tensors(tensors: Mapping[str, Tensor], dtype: torch.dtype = torch.float32) -> tuple[Any, nn.Module]:
    """Return what the tensors are recognised as, and the network loaded from them."""
    architectures, checkpoints = _discovery.catalog().layouts()
    header = pickled.of_state_dict(dict(tensors))
    (found,) = recognize.recognize(header, architectures, checkpoints)
    return found, component.load_component(found, header, device="cpu", dtype=dtype)


def block_sizes(config: FluxBlocksConfig) -> dict[str, Any]:
    """Return the config of diffusers' networks."""
    return {
        "in_channels": config.in_channels,
        "num_layers": config.n_double_blocks,
        "num_single_layers": config.n_single_blocks,
        "attention_head_dim": config.head_dim,
        "num_attention_heads": config.n_heads,
        "joint_attention_dim": config.context_dim,
        "pooled_projection_dim": config.pooled_dim,
        "guidance_embeds": config.guidance_embed,
        "axes_dims_rope": config.axes_dims,
    }


def oracle_dit(config: FluxDiTConfig, seed: int = 0) -> FluxTransformer2DModel:
    """Return diffusers' transformer with random weights."""
    oracle = FluxTransformer2DModel(out_channels=config.out_channels, **block_sizes(config)).eval()
    oracle.load_state_dict(draw_weights(shapes_of(oracle), seed))
    return oracle
