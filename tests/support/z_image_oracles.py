"""Tiny Z-Image networks of ours and of diffusers with the same weights, for whole trajectories."""

from __future__ import annotations

from typing import Any

import torch
from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, ZImageTransformer2DModel
from transformers import Qwen3Config, Qwen3Model

from diffsynth.models.config import FluxAutoencoderConfig, Qwen3TextEncoderConfig
from diffsynth.models.flux_autoencoder import FluxAutoencoder
from diffsynth.models.qwen3 import Qwen3TextEncoder
from diffsynth.testing.tiny_processors import byte_tokenizer
from diffsynth_zimage import ZImagePipeline
from diffsynth_zimage.config import ZImageDiTConfig, ZImageOmniDiTConfig
from diffsynth_zimage.dit import ZImageDiT
from diffsynth_zimage.omni import ZImageOmniDiT
from parity import draw_weights, shapes_of

DIT = {
    "dim": 48,
    "n_layers": 2,
    "n_refiner_layers": 1,
    "n_heads": 2,
    "n_kv_heads": 2,
    "cap_feat_dim": 32,
    "axes_dims": (8, 8, 8),
}
AUTOENCODER = {"block_out_channels": (8, 8, 16, 16), "layers_per_block": 1, "latent_channels": 16}
SIZE = {"height": 208, "width": 176}


def tiny_pipelines(*, siglip_feat_dim: int | None = None, **components: Any) -> tuple[ZImagePipeline, dict[str, Any]]:
    """Return our pipeline, and the components of diffusers' pipelines.

    Args:
        siglip_feat_dim: width of the features of Omni-Base's network; None is Z-Image's network.
        components: further components of ours.
    """
    oracle_dit = ZImageTransformer2DModel(
        in_channels=16, axes_lens=(1024, 64, 64), siglip_feat_dim=siglip_feat_dim, **DIT
    )
    oracle_vae = AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        norm_num_groups=4,
        use_quant_conv=False,
        use_post_quant_conv=False,
        scaling_factor=0.3611,
        shift_factor=0.1159,
        **AUTOENCODER,
    )
    text = {
        "hidden_size": 32,
        "num_hidden_layers": 3,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "head_dim": 16,
        "intermediate_size": 48,
    }
    tokenizer = byte_tokenizer()
    encoder = Qwen3Model(
        Qwen3Config(vocab_size=len(tokenizer), rope_parameters={"rope_theta": 1e6, "rope_type": "default"}, **text)
    )
    for seed, module in enumerate((oracle_dit, oracle_vae, encoder)):
        module.eval().load_state_dict(draw_weights(shapes_of(module), seed=seed))

    dit = ZImageDiT(ZImageDiTConfig(**DIT))
    if siglip_feat_dim is not None:
        dit = ZImageOmniDiT(ZImageOmniDiTConfig(**DIT, siglip_feat_dim=siglip_feat_dim))
    vae = FluxAutoencoder(FluxAutoencoderConfig(norm_groups=4, **AUTOENCODER))
    text_encoder = Qwen3TextEncoder(
        Qwen3TextEncoderConfig(
            hidden_size=32,
            num_layers=3,
            num_heads=2,
            num_kv_heads=1,
            head_dim=16,
            intermediate_size=48,
            vocab_size=len(tokenizer),
        )
    )
    dit.load_state_dict(oracle_dit.state_dict())
    vae.load_state_dict(oracle_vae.state_dict())
    text_encoder.model.load_state_dict(encoder.state_dict())
    ours = ZImagePipeline.from_components(
        dit=dit,
        vae=vae,
        text_encoder=text_encoder,
        tokenizer=tokenizer,
        device="cpu",
        torch_dtype=torch.float32,
        **components,
    )
    parts = {
        "scheduler": FlowMatchEulerDiscreteScheduler(num_train_timesteps=1000, shift=3.0),
        "vae": oracle_vae,
        "text_encoder": encoder,
        "tokenizer": tokenizer,
        "transformer": oracle_dit,
    }
    return ours, parts


def noise(seed: int) -> torch.Tensor:
    generator = torch.Generator("cpu").manual_seed(seed)
    return torch.randn(1, 16, SIZE["height"] // 8, SIZE["width"] // 8, generator=generator)
