"""Z-Image pipeline of a few thousand parameters that generates latents from a prompt, for tests of the engine."""

from __future__ import annotations

import torch

from diffsynth.models.config import FluxAutoencoderConfig, Qwen3TextEncoderConfig
from diffsynth.models.flux_autoencoder import FluxAutoencoder
from diffsynth.models.qwen3 import Qwen3TextEncoder
from diffsynth.testing.tiny_processors import byte_tokenizer
from diffsynth_zimage import ZImagePipeline
from diffsynth_zimage.config import ZImageDiTConfig
from diffsynth_zimage.dit import ZImageDiT
from parity import draw_weights, shapes_of

SMALL = {"height": 32, "width": 48, "output_type": "latents", "seed": 0}


def tiny_z_image(*, n_layers: int = 6, with_autoencoder: bool = False) -> ZImagePipeline:
    """Return a pipeline with refiners of one block and `n_layers` layers, so that step caches apply to the layers."""
    tokenizer = byte_tokenizer()
    config = {"dim": 24, "n_heads": 1, "n_kv_heads": 1, "cap_feat_dim": 16, "axes_dims": (8, 8, 8)}
    dit = ZImageDiT(ZImageDiTConfig(n_layers=n_layers, n_refiner_layers=1, **config))
    encoder = Qwen3TextEncoder(
        Qwen3TextEncoderConfig(
            hidden_size=16,
            num_layers=2,
            num_heads=1,
            num_kv_heads=1,
            head_dim=16,
            intermediate_size=24,
            vocab_size=len(tokenizer),
        )
    )
    modules = {"dit": dit, "text_encoder": encoder}
    if with_autoencoder:
        sizes = {"block_out_channels": (8, 8, 16, 16), "layers_per_block": 1, "latent_channels": 16}
        modules["vae"] = FluxAutoencoder(FluxAutoencoderConfig(norm_groups=4, **sizes))
    for seed, module in enumerate(modules.values()):
        module.load_state_dict(draw_weights(shapes_of(module), seed=seed))
    return ZImagePipeline.from_components(tokenizer=tokenizer, device="cpu", torch_dtype=torch.float32, **modules)
