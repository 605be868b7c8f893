"""Inputs of tiny networks and of calls of tiny models, for the conformance suite. Light: no torch."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from diffsynth.testing.tiny_inputs import tiny_image
from diffsynth_flux.flux1.config import (
    ClipTextEncoderConfig,
    FluxControlNetConfig,
    FluxDiTConfig,
    IPAdapterConfig,
    ReduxEmbedderConfig,
    T5TextEncoderConfig,
)

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


def tiny_controlnet_inputs(config: FluxControlNetConfig, generator: torch.Generator) -> dict[str, Any]:
    """Return a dict of arguments of `FluxControlNet.forward`: two images of 3 x 5 tokens; fp32 on the CPU."""
    import torch

    from diffsynth_flux.flux1.extension import Inputs

    inputs = Inputs(
        patches=torch.randn(2, 15, config.in_channels, generator=generator),
        sigma=torch.tensor([0.3, 0.8]),
        prompt_embeds=torch.randn(2, 7, config.context_dim, generator=generator),
        pooled_prompt_embeds=torch.randn(2, config.pooled_dim, generator=generator),
        guidance=torch.tensor([3.5, 2.0]) if config.guidance_embed else None,
    )
    control = torch.randn(2, config.control_channels // 4, 6, 10, generator=generator)
    return {"inputs": inputs, "control": control, "mode": 1 if config.num_modes else None}


def tiny_text_inputs(config: ClipTextEncoderConfig | T5TextEncoderConfig, generator: torch.Generator) -> dict[str, Any]:
    """Return a dict of the argument of a text encoder: random token ids of two texts, int64 on the CPU."""
    import torch

    return {"input_ids": torch.randint(config.vocab_size, (2, 11), generator=generator)}


def tiny_redux_inputs(config: ReduxEmbedderConfig, generator: torch.Generator) -> dict[str, Any]:
    """Return a dict of the argument of `ReduxEmbedder.forward`: hidden states of two images, fp32 on the CPU."""
    import torch

    return {"hidden": torch.randn(2, 5, config.image_dim, generator=generator)}


def tiny_ip_adapter_inputs(config: IPAdapterConfig, generator: torch.Generator) -> dict[str, Any]:
    """Return a dict of the argument of `FluxIPAdapter.forward`: pooled states of two images, fp32 on the CPU."""
    import torch

    return {"pooled": torch.randn(2, config.image_dim, generator=generator)}


def kontext_inputs(size: Mapping[str, int]) -> dict[str, Any]:
    """Return a dict of call arguments with a reference image, for a result of `size` in pixels."""
    return {"kontext_images": tiny_image(size)}


def fill_inputs(size: Mapping[str, int]) -> dict[str, Any]:
    """Return a dict of call arguments with an image to fill and its mask, for a result of `size` in pixels."""
    return {"flux_fill_image": tiny_image(size), "flux_fill_mask": tiny_image(size, turn=3).convert("L")}


def control_inputs(size: Mapping[str, int]) -> dict[str, Any]:
    """Return a dict of call arguments with a control image, for a result of `size` in pixels."""
    return {"control_image": tiny_image(size)}


def redux_inputs(size: Mapping[str, int]) -> dict[str, Any]:
    """Return a dict of call arguments with an image to vary, for a result of `size` in pixels."""
    return {"flux_redux_image": tiny_image(size)}


def ip_adapter_inputs(size: Mapping[str, int]) -> dict[str, Any]:
    """Return a dict of call arguments with an image prompt, for a result of `size` in pixels."""
    return {"ipadapter_images": tiny_image(size)}
