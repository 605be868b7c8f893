"""Compare whole calls of FLUX with diffusers.

    python benchmarks/flux.py                          on a GPU: published sizes, random weights, bf16
    python benchmarks/flux.py --cases klein-4b         one case
    python benchmarks/flux.py --tiny                   tiny sizes in fp32 on the CPU

`image_calls.py` describes what is measured.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from typing import Any

import image_calls
import torch
from image_calls import TINY_AUTOENCODER, Benchmark, Case, Line
from torch import nn

from diffsynth.models.config import FluxAutoencoderConfig, Qwen3TextEncoderConfig
from diffsynth.models.flux_autoencoder import FluxAutoencoder
from diffsynth.models.qwen3 import Qwen3TextEncoder
from diffsynth.testing.tiny_processors import byte_tokenizer
from diffsynth_flux import Flux2ImagePipeline, FluxImagePipeline
from diffsynth_flux.flux1.config import ClipTextEncoderConfig, FluxDiTConfig, T5TextEncoderConfig
from diffsynth_flux.flux1.dit import FluxDiT
from diffsynth_flux.flux1.text_encoders import ClipTextEncoder, T5TextEncoder
from diffsynth_flux.flux2.autoencoder import Flux2Autoencoder
from diffsynth_flux.flux2.config import Flux2AutoencoderConfig, Flux2DiTConfig
from diffsynth_flux.flux2.dit import Flux2DiT


class Flux1(Line):
    """FLUX.1-dev."""

    networks = {
        "dit": (FluxDiTConfig, FluxDiT),
        "text_encoder_1": (ClipTextEncoderConfig, ClipTextEncoder),
        "text_encoder_2": (T5TextEncoderConfig, T5TextEncoder),
        "vae": (FluxAutoencoderConfig, FluxAutoencoder),
    }

    def their_networks(self, configs: Mapping[str, Any]) -> dict[str, nn.Module]:
        """Return a dict component of diffusers' pipeline -> network of the same size; on the current default device."""
        from diffusers import FluxTransformer2DModel
        from transformers import CLIPTextConfig, CLIPTextModel, T5Config, T5EncoderModel

        dit, clip, t5 = (configs[role] for role in ("dit", "text_encoder_1", "text_encoder_2"))
        return {
            "transformer": FluxTransformer2DModel(
                in_channels=dit.in_channels,
                num_layers=dit.n_double_blocks,
                num_single_layers=dit.n_single_blocks,
                attention_head_dim=dit.head_dim,
                num_attention_heads=dit.n_heads,
                joint_attention_dim=dit.context_dim,
                pooled_projection_dim=dit.pooled_dim,
                guidance_embeds=True,
                axes_dims_rope=dit.axes_dims,
            ),
            "text_encoder": CLIPTextModel(
                CLIPTextConfig(
                    hidden_size=clip.hidden_size,
                    num_hidden_layers=clip.num_layers,
                    num_attention_heads=clip.num_heads,
                    intermediate_size=clip.intermediate_size,
                )
            ),
            "text_encoder_2": T5EncoderModel(
                T5Config(
                    d_model=t5.hidden_size,
                    d_kv=t5.head_dim,
                    d_ff=t5.intermediate_size,
                    num_heads=t5.num_heads,
                    num_layers=t5.num_layers,
                    vocab_size=t5.vocab_size,
                    feed_forward_proj="gated-gelu",
                )
            ),
            "vae": image_calls.their_flux_autoencoder(configs["vae"]),
        }

    def our_pipeline(self, parts: Mapping[str, nn.Module], device: torch.device, dtype: torch.dtype) -> Any:
        """Return our pipeline of networks."""
        tokenizers = {"tokenizer_1": byte_tokenizer(), "tokenizer_2": byte_tokenizer()}
        return FluxImagePipeline.from_components(**parts, **tokenizers, device=device, torch_dtype=dtype)

    def their_pipeline(self, parts: Mapping[str, nn.Module]) -> Any:
        """Return diffusers' pipeline of networks."""
        from diffusers import FlowMatchEulerDiscreteScheduler, FluxPipeline

        tokenizer = byte_tokenizer()
        tokenizer.model_max_length = 77
        scheduler = FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True)
        return FluxPipeline(scheduler, tokenizer=tokenizer, tokenizer_2=tokenizer, **parts)


class Klein(Line):
    """FLUX.2-klein."""

    networks = {
        "dit": (Flux2DiTConfig, Flux2DiT),
        "text_encoder": (Qwen3TextEncoderConfig, Qwen3TextEncoder),
        "vae": (Flux2AutoencoderConfig, Flux2Autoencoder),
    }

    def their_networks(self, configs: Mapping[str, Any]) -> dict[str, nn.Module]:
        """Return a dict component of diffusers' pipeline -> network of the same size; on the current default device."""
        from diffusers import AutoencoderKLFlux2, Flux2Transformer2DModel
        from transformers import Qwen3Config, Qwen3ForCausalLM

        dit, text, vae = (configs[role] for role in ("dit", "text_encoder", "vae"))
        return {
            "transformer": Flux2Transformer2DModel(
                in_channels=dit.in_channels,
                num_layers=dit.n_layers,
                num_single_layers=dit.n_single_layers,
                attention_head_dim=dit.head_dim,
                num_attention_heads=dit.n_heads,
                joint_attention_dim=dit.prompt_dim,
                mlp_ratio=dit.ffn_dim / dit.dim,
                axes_dims_rope=dit.axes_dims,
                guidance_embeds=False,
            ),
            "text_encoder": Qwen3ForCausalLM(
                Qwen3Config(
                    **image_calls.their_language_model(text),
                    head_dim=text.head_dim,
                    rope_parameters={"rope_theta": text.rope_theta, "rope_type": "default"},
                    tie_word_embeddings=True,
                )
            ),
            "vae": AutoencoderKLFlux2(
                decoder_block_out_channels=vae.decoder_block_out_channels, **image_calls.their_autoencoder(vae)
            ),
        }

    def our_pipeline(self, parts: Mapping[str, nn.Module], device: torch.device, dtype: torch.dtype) -> Any:
        """Return our pipeline of networks."""
        return Flux2ImagePipeline.from_components(**parts, tokenizer=byte_tokenizer(), device=device, torch_dtype=dtype)

    def their_pipeline(self, parts: Mapping[str, nn.Module]) -> Any:
        """Return diffusers' pipeline of networks."""
        from diffusers import FlowMatchEulerDiscreteScheduler, Flux2KleinPipeline

        scheduler = FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True)
        return Flux2KleinPipeline(scheduler, tokenizer=byte_tokenizer(), is_distilled=True, **parts)

    def their_arguments(self, pipe: Any, side: int) -> dict[str, Any]:
        """Return further arguments of diffusers' call: the hidden states that it reads, for a text encoder of any
        size.
        """
        layers = len(pipe.text_encoder.model.layers)
        return {"text_encoder_out_layers": tuple(layers * quarter // 4 for quarter in (1, 2, 3))}


KLEIN_4B = {"dim": 3072, "n_heads": 24, "n_layers": 5, "n_single_layers": 20, "prompt_dim": 7680, "ffn_dim": 9216}
FULL = {
    "flux.1-dev": Case(Flux1(), 28, 1024),
    "klein-4b": Case(Klein(), 4, 1024, {"dit": KLEIN_4B | {"embeds_guidance": False}}),
}
TINY = {
    "flux.1-dev": Case(
        Flux1(),
        4,
        64,
        {
            "dit": {"dim": 64, "n_heads": 2, "n_double_blocks": 1, "n_single_blocks": 2}
            | {"context_dim": 64, "pooled_dim": 64},
            "text_encoder_1": {"hidden_size": 64, "num_layers": 2, "num_heads": 1, "intermediate_size": 96},
            "text_encoder_2": {"hidden_size": 64, "num_layers": 2, "num_heads": 2, "head_dim": 32}
            | {"intermediate_size": 96, "vocab_size": 512},
            "vae": TINY_AUTOENCODER,
        },
    ),
    "klein-4b": Case(
        Klein(),
        4,
        64,
        {
            "dit": {"dim": 64, "n_heads": 2, "n_layers": 1, "n_single_layers": 2, "prompt_dim": 192, "ffn_dim": 192}
            | {"axes_dims": (8, 8, 8, 8), "embeds_guidance": False},
            "text_encoder": {"hidden_size": 64, "num_layers": 4, "num_heads": 2, "num_kv_heads": 1, "head_dim": 32}
            | {"intermediate_size": 96, "vocab_size": 512},
            "vae": TINY_AUTOENCODER | {"decoder_block_out_channels": (8, 8, 16, 16)},
        },
    ),
}
BENCHMARK = Benchmark(__file__, "diffsynth-flux", FULL, TINY, goals={"flux.1-dev": 3.5, "klein-4b": 0.40})

if __name__ == "__main__":
    sys.exit(image_calls.main(BENCHMARK, __doc__))
