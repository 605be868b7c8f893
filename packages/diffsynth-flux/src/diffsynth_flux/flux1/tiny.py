"""Inputs of tiny networks, for the conformance suite. Light: no torch."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from diffsynth_flux.flux1.config import ClipTextEncoderConfig, FluxDiTConfig, T5TextEncoderConfig

if TYPE_CHECKING:
    import torch


def tiny_dit_inputs(config: FluxDiTConfig, generator: torch.Generator) -> dict[str, Any]:
    """Return a dict of arguments of `FluxDiT.forward`: two images of 3 x 5 tokens; fp32 on the CPU."""
    import torch

    channels = config.condition_channels
    return {
        "latents": torch.randn(2, config.latent_channels, 6, 10, generator=generator),
        "sigma": torch.tensor([0.3, 0.8]),
        "prompt_embeds": torch.randn(2, 7, config.context_dim, generator=generator),
        "pooled_prompt_embeds": torch.randn(2, config.pooled_dim, generator=generator),
        "guidance": torch.tensor([3.5, 2.0]) if config.guidance_embed else None,
        "condition_latents": torch.randn(2, channels, 6, 10, generator=generator) if channels else None,
    }


def tiny_text_inputs(config: ClipTextEncoderConfig | T5TextEncoderConfig, generator: torch.Generator) -> dict[str, Any]:
    """Return a dict of the argument of a text encoder: random token ids of two texts, int64 on the CPU."""
    import torch

    return {"input_ids": torch.randint(config.vocab_size, (2, 11), generator=generator)}
