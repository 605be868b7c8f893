"""Inputs of tiny networks and of calls of tiny models, for the conformance suite; those of Z-Image's transformer are in
`config`.

Light: no torch.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from diffsynth.testing.tiny_inputs import tiny_image
from diffsynth_zimage.config import (
    Siglip2ImageEncoderConfig,
    ZImageControlNetConfig,
    ZImageDiTConfig,
    ZImageOmniDiTConfig,
    tiny_dit_inputs,
)

if TYPE_CHECKING:
    import torch


def tiny_controlnet_inputs(config: ZImageControlNetConfig, generator: torch.Generator) -> dict[str, Any]:
    """Return a dict of arguments of `ZImageControlNet.forward` for all its blocks: two images of 3 x 5 tokens with
    captions of two lengths; fp32 on the CPU.
    """
    import torch

    from diffsynth_zimage.dit import rotary_embedding
    from diffsynth_zimage.extension import Stream

    quarter = config.head_dim // 4
    network = ZImageDiTConfig(
        dim=config.dim,
        n_heads=config.n_heads,
        n_kv_heads=config.n_kv_heads,
        axes_dims=(quarter, (config.head_dim - quarter) // 2, (config.head_dim - quarter) // 2),
    )
    positions = torch.arange(3 * 96).view(1, 96, 3)
    stream = Stream(
        image=torch.randn(2, 32, config.dim, generator=generator),
        caption=torch.randn(2, 64, config.dim, generator=generator),
        grid=(3, 5),
        positions=positions,
        rotary=rotary_embedding(positions, network, torch.device("cpu")),
        time_embed=torch.randn(2, config.time_dim, generator=generator),
        joint_mask=torch.arange(96)[None, None, None, :] < torch.tensor([96, 64]).view(2, 1, 1, 1),
    )
    size = (3 * config.patch_size, 5 * config.patch_size)
    return {"stream": stream, "control": torch.randn(2, config.in_channels, *size, generator=generator)}


def tiny_omni_inputs(config: ZImageOmniDiTConfig, generator: torch.Generator) -> dict[str, Any]:
    """Return a dict of arguments of `ZImageOmniDiT.forward`: two images, captions of two lengths in three segments, and
    an extension with a reference image; fp32 on the CPU.
    """
    import torch

    from diffsynth_zimage.features.edit import References

    image = torch.randn(1, config.in_channels, 8, 4, generator=generator)
    features = torch.randn(3, 2, config.siglip_feat_dim, generator=generator)
    segments = torch.tensor([[1, 1, 2, 2, 2, 2, 2, 3, 3], [1, 1, 2, 3, 3, 0, 0, 0, 0]])
    inputs = tiny_dit_inputs(config, generator)
    return {**inputs, "prompt_mask": segments, "extensions": (References((image,), (features,)),)}


def tiny_siglip2_inputs(config: Siglip2ImageEncoderConfig, generator: torch.Generator) -> dict[str, Any]:
    """Return a dict of the argument of `Siglip2ImageEncoder.forward`: patches of two random images; fp32 on the CPU."""
    import torch

    return {"patches": torch.rand(2, 3, 5, 3 * config.patch_size**2, generator=generator) * 2 - 1}


def edit_inputs(size: Mapping[str, int]) -> dict[str, Any]:
    """Return a dict of call arguments with a reference image, for a result of `size` in pixels."""
    return {"edit_image": tiny_image(size)}
