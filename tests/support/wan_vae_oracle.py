"""diffusers' AutoencoderKLWan as pipelines use it, with scaled latents, and with random weights."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from diffusers import AutoencoderKLWan
from torch import Tensor, nn

import parity
from diffsynth import _discovery
from diffsynth.core.loader import component, pickled, recognize


def draw_weights(shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Tensor]:
    """Return weights as `parity` does, with norms at 1 +- 0.3 and outputs so small that diffusers clamps nothing."""
    weights = parity.draw_weights(shapes)
    for name, weight in weights.items():
        if name.endswith("gamma"):
            weights[name] = 1 + 0.3 * weight.clamp(-1, 1)
        if name.startswith(("decoder.conv_out", "decoder.head.2")):
            weights[name] = 0.1 * weight
    return weights


def loaded(published: dict[str, Tensor], architecture: str, config: Any) -> nn.Module:
    """Return the module that the loader builds from a file recognised by structure."""
    tensors = pickled.of_state_dict(published)
    (found,) = recognize.recognize(tensors, *_discovery.catalog().layouts())
    assert (found.architecture.name, found.config) == (architecture, config)
    return component.load_component(found, tensors, device="cpu", dtype=torch.float32).eval()


def latents_of(oracle: AutoencoderKLWan, video: Tensor) -> Tensor:
    """Return the scaled latents of the posterior's mean."""
    mean, std = _scales(oracle)
    return (oracle.encode(video).latent_dist.mode() - mean) / std


def video_of(oracle: AutoencoderKLWan, latents: Tensor) -> Tensor:
    """Return the frames, clamped to [-1, 1]."""
    mean, std = _scales(oracle)
    return oracle.decode((latents * std + mean).to(oracle.dtype)).sample


def draw_video(frames: int, height: int, width: int, batch: int = 1) -> Tensor:
    """Return a video, uniform in [-1, 1]."""
    return torch.rand(batch, 3, frames, height, width, generator=torch.Generator().manual_seed(1)) * 2 - 1


def _scales(oracle: AutoencoderKLWan) -> tuple[Tensor, Tensor]:
    facts = (oracle.config.latents_mean, oracle.config.latents_std)
    mean, std = (torch.tensor(fact).view(1, -1, 1, 1, 1) for fact in facts)
    return mean, std
