"""Tiny Qwen-Image networks of ours and of diffusers with the same weights."""

from __future__ import annotations

from diffusers import QwenImageTransformer2DModel

from diffsynth_qwen_image.config import QwenImageDiTConfig


def oracle_dit(config: QwenImageDiTConfig, *, zero_cond_t: bool = False) -> QwenImageTransformer2DModel:
    """Return diffusers' network of a config.

    Args:
        config: of our network.
        zero_cond_t: whether appended images are modulated by the embedding of noise level 0.
    """
    return QwenImageTransformer2DModel(
        patch_size=config.patch_size,
        in_channels=config.patch_dim,
        out_channels=config.in_channels,
        num_layers=config.n_layers,
        attention_head_dim=config.head_dim,
        num_attention_heads=config.n_heads,
        joint_attention_dim=config.prompt_dim,
        axes_dims_rope=config.axes_dims,
        zero_cond_t=zero_cond_t,
        use_additional_t_cond=config.layered,
        use_layer3d_rope=config.layered,
    ).eval()
