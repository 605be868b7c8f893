"""Inputs of tiny networks that hold a `Stream`, for the conformance suite; those of the transformer are in `config`.

Light: no torch.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from diffsynth_zimage.config import ZImageControlNetConfig, ZImageDiTConfig

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
