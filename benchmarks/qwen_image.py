"""Compare whole calls of Qwen-Image with diffusers.

    python benchmarks/qwen_image.py                    on a GPU: published sizes, random weights, bf16
    python benchmarks/qwen_image.py --tiny             tiny sizes in fp32 on the CPU

A call has 50 steps with classifier-free guidance, which scales each token of the guided velocity as diffusers does: two
forward passes a step. `image_calls.py` describes what is measured.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from typing import Any

import image_calls
import torch
from image_calls import Benchmark, Case, Line
from torch import nn

from diffsynth.models.config import Qwen25VLTextEncoderConfig, WanAutoencoderConfig
from diffsynth.models.qwen25_vl import Qwen25VLTextEncoder
from diffsynth.models.wan_autoencoder import WanAutoencoder
from diffsynth_qwen_image import QwenImagePipeline
from diffsynth_qwen_image.config import QwenImageDiTConfig
from diffsynth_qwen_image.dit import QwenImageDiT
from diffsynth_qwen_image.tiny import vision_tokenizer

SCHEDULER = {
    "use_dynamic_shifting": True,
    "base_shift": 0.5,
    "max_shift": 0.9,
    "max_image_seq_len": 8192,
    "shift_terminal": 0.02,
    "time_shift_type": "exponential",
}
"""Settings of the published scheduler that differ from diffusers' defaults."""


class QwenImage(Line):
    """Qwen-Image with classifier-free guidance."""

    networks = {
        "dit": (QwenImageDiTConfig, QwenImageDiT),
        "text_encoder": (Qwen25VLTextEncoderConfig, Qwen25VLTextEncoder),
        "vae": (WanAutoencoderConfig, WanAutoencoder),
    }

    def their_networks(self, configs: Mapping[str, Any]) -> dict[str, nn.Module]:
        """Return a dict component of diffusers' pipeline -> network of the same size; on the current default device."""
        from diffusers import AutoencoderKLQwenImage, QwenImageTransformer2DModel
        from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

        dit, text = configs["dit"], configs["text_encoder"]
        rope = {"rope_type": "default", "rope_theta": text.rope_theta, "mrope_section": list(text.rope_sections)}
        return {
            "transformer": QwenImageTransformer2DModel(
                patch_size=dit.patch_size,
                in_channels=dit.patch_dim,
                out_channels=dit.in_channels,
                num_layers=dit.n_layers,
                attention_head_dim=dit.head_dim,
                num_attention_heads=dit.n_heads,
                joint_attention_dim=dit.prompt_dim,
                axes_dims_rope=dit.axes_dims,
            ),
            "text_encoder": Qwen2_5_VLForConditionalGeneration(
                Qwen2_5_VLConfig(
                    text_config=image_calls.their_language_model(text) | {"rope_parameters": rope},
                    vision_config={
                        "depth": text.vision_layers,
                        "hidden_size": text.vision_hidden_size,
                        "num_heads": text.vision_heads,
                        "intermediate_size": text.vision_intermediate_size,
                        "out_hidden_size": text.hidden_size,
                        "fullatt_block_indexes": list(text.full_attention_layers),
                    },
                    tie_word_embeddings=True,
                )
            ),
            "vae": AutoencoderKLQwenImage(base_dim=configs["vae"].dim),
        }

    def our_pipeline(self, parts: Mapping[str, nn.Module], device: torch.device, dtype: torch.dtype) -> Any:
        """Return our pipeline of networks."""
        return QwenImagePipeline.from_components(
            **parts, tokenizer=vision_tokenizer(), device=device, torch_dtype=dtype
        )

    def their_pipeline(self, parts: Mapping[str, nn.Module]) -> Any:
        """Return diffusers' pipeline of networks."""
        from diffusers import FlowMatchEulerDiscreteScheduler
        from diffusers import QwenImagePipeline as TheirPipeline

        tokenizer = vision_tokenizer()
        pipe = TheirPipeline(FlowMatchEulerDiscreteScheduler(**SCHEDULER), tokenizer=tokenizer, **parts)
        # The published tokenizer has 34 tokens before the prompt, this one has one for each byte.
        before = pipe.prompt_template_encode.partition("{}")[0]
        pipe.prompt_template_encode_start_idx = len(tokenizer(before)["input_ids"])
        return pipe

    def our_arguments(self, side: int) -> dict[str, Any]:
        """Return further arguments of our call: guidance, with diffusers' norm of each token."""
        return {"negative_prompt": " ", "cfg_scale": 4.0, "guidance": "token_norm"}

    def their_arguments(self, pipe: Any, side: int) -> dict[str, Any]:
        """Return further arguments of diffusers' call: guidance."""
        return {"negative_prompt": " ", "true_cfg_scale": 4.0}


FULL = {"qwen-image": Case(QwenImage(), 50, 1024)}
TINY = {
    "qwen-image": Case(
        QwenImage(),
        4,
        64,
        {
            "dit": {"dim": 64, "n_heads": 2, "n_layers": 2, "prompt_dim": 64, "ffn_dim": 256, "axes_dims": (4, 14, 14)},
            "text_encoder": {"hidden_size": 64, "num_layers": 2, "num_heads": 2, "num_kv_heads": 1, "head_dim": 32}
            | {"intermediate_size": 96, "vocab_size": 512, "vision_hidden_size": 32, "vision_layers": 1}
            | {"vision_heads": 2, "vision_intermediate_size": 48, "full_attention_layers": (0,)},
            "vae": {"dim": 8},
        },
    ),
}
BENCHMARK = Benchmark(__file__, "diffsynth-qwen-image", FULL, TINY, goals={"qwen-image": 12.7})

if __name__ == "__main__":
    sys.exit(image_calls.main(BENCHMARK, __doc__))
