"""Tiny FLUX.2 networks of ours and of diffusers with the same weights."""

from __future__ import annotations

from typing import Any

import torch
from diffusers import AutoencoderKLFlux2, FlowMatchEulerDiscreteScheduler, Flux2Transformer2DModel
from transformers import (
    Mistral3Config,
    Mistral3ForConditionalGeneration,
    MistralConfig,
    PreTrainedTokenizerFast,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from diffsynth.models.config import Qwen3TextEncoderConfig
from diffsynth.models.qwen3 import Qwen3TextEncoder
from diffsynth.testing.tiny_processors import byte_tokenizer
from diffsynth_flux import Flux2ImagePipeline
from diffsynth_flux.flux2.autoencoder import Flux2Autoencoder
from diffsynth_flux.flux2.config import Flux2AutoencoderConfig, Flux2DiTConfig, MistralTextEncoderConfig
from diffsynth_flux.flux2.dit import Flux2DiT
from diffsynth_flux.flux2.text_encoders import MistralTextEncoder
from parity import draw_weights, shapes_of

SIZE = {"height": 80, "width": 48}
MISTRAL_TEMPLATE = (
    "<s>{% for message in messages %}{% set text = message.content[0].text %}{% if message.role == 'system' %}"
    "[SYSTEM_PROMPT]{{ text }}[/SYSTEM_PROMPT]{% else %}[INST]{{ text }}[/INST]{% endif %}{% endfor %}"
)
"""Mistral-Small-3.2's chat template for a system message and texts of users."""
AUTOENCODER = Flux2AutoencoderConfig(
    latent_channels=4,
    block_out_channels=(8, 8, 16, 16),
    decoder_block_out_channels=(8, 8, 8, 16),
    layers_per_block=1,
    norm_groups=4,
)
TEXT = {
    "hidden_size": 16,
    "num_hidden_layers": 4,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 16,
    "intermediate_size": 24,
}


def oracle_dit(config: Flux2DiTConfig) -> Flux2Transformer2DModel:
    """Return diffusers' network of a config."""
    return Flux2Transformer2DModel(
        in_channels=config.in_channels,
        num_layers=config.n_layers,
        num_single_layers=config.n_single_layers,
        attention_head_dim=config.head_dim,
        num_attention_heads=config.n_heads,
        joint_attention_dim=config.prompt_dim,
        timestep_guidance_channels=config.frequency_dim,
        mlp_ratio=config.ffn_dim / config.dim,
        axes_dims_rope=config.axes_dims,
        guidance_embeds=config.embeds_guidance,
    ).eval()


def oracle_autoencoder(config: Flux2AutoencoderConfig) -> AutoencoderKLFlux2:
    """Return diffusers' autoencoder of a config."""
    return AutoencoderKLFlux2(
        block_out_channels=config.block_out_channels,
        decoder_block_out_channels=config.decoder_block_out_channels,
        layers_per_block=config.layers_per_block,
        latent_channels=config.latent_channels,
        norm_num_groups=config.norm_groups,
    ).eval()


def draw_autoencoder(oracle: AutoencoderKLFlux2, seed: int = 0) -> dict[str, torch.Tensor]:
    """Return random weights of an autoencoder; no mean or variance of its latents is neutral."""
    weights = draw_weights(shapes_of(oracle), seed=seed)
    weights["bn.running_mean"] = weights["bn.running_mean"] - 0.5
    weights["bn.num_batches_tracked"] = torch.tensor(7)
    return weights


def flux2_tokenizer(*, klein: bool) -> PreTrainedTokenizerFast:
    """Return a tokenizer of bytes with the chat template of FLUX.2-klein's text encoder, or of FLUX.2-dev's."""
    tokenizer = byte_tokenizer()
    if not klein:
        tokenizer.chat_template = MISTRAL_TEMPLATE
    return tokenizer


def oracle_mistral(vocab_size: int) -> Mistral3ForConditionalGeneration:
    """Return transformers' tiny Mistral-3, with the vision tower that FLUX.2 does not use."""
    vision = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 1, "intermediate_size": 16}
    text = MistralConfig(
        vocab_size=vocab_size,
        rms_norm_eps=1e-5,
        rope_parameters={"rope_theta": 1e9, "rope_type": "default"},
        sliding_window=None,
        **TEXT,
    )
    return Mistral3ForConditionalGeneration(
        Mistral3Config(text_config=text, vision_config={"model_type": "pixtral", **vision})
    ).eval()


def oracle_qwen3(vocab_size: int) -> Qwen3ForCausalLM:
    """Return transformers' tiny Qwen3."""
    rope = {"rope_theta": 1e6, "rope_type": "default"}
    return Qwen3ForCausalLM(Qwen3Config(vocab_size=vocab_size, rope_parameters=rope, **TEXT)).eval()


def mistral_of(oracle: Mistral3ForConditionalGeneration) -> MistralTextEncoder:
    """Return our text encoder with the weights of transformers'."""
    ours = MistralTextEncoder(MistralTextEncoderConfig(**_sizes(oracle.config.text_config), norm_eps=1e-5)).eval()
    ours.language_model["model"].load_state_dict(oracle.model.language_model.state_dict())
    return ours


def qwen3_of(oracle: Qwen3ForCausalLM) -> Qwen3TextEncoder:
    """Return our text encoder with the weights of transformers'."""
    ours = Qwen3TextEncoder(Qwen3TextEncoderConfig(**_sizes(oracle.config))).eval()
    ours.model.load_state_dict(oracle.model.state_dict())
    return ours


def _sizes(config: Any) -> dict[str, int]:
    return {
        "hidden_size": config.hidden_size,
        "num_layers": config.num_hidden_layers,
        "num_heads": config.num_attention_heads,
        "num_kv_heads": config.num_key_value_heads,
        "head_dim": config.head_dim,
        "intermediate_size": config.intermediate_size,
        "vocab_size": config.vocab_size,
    }


def tiny_pipelines(*, klein: bool, guided: bool = True) -> tuple[Flux2ImagePipeline, dict[str, Any]]:
    """Return our pipeline, and the components of diffusers' pipelines with the same weights.

    Args:
        klein: whether it is FLUX.2-klein, without embedded guidance and with Qwen3; else FLUX.2-dev.
        guided: whether diffusers' klein pipeline runs the branch of the negative prompt.
    """
    config = Flux2DiTConfig(
        dim=32,
        n_heads=2,
        n_layers=2,
        n_single_layers=2,
        in_channels=AUTOENCODER.packed_channels,
        prompt_dim=3 * TEXT["hidden_size"],
        ffn_dim=48,
        embeds_guidance=not klein,
        axes_dims=(4, 4, 4, 4),
    )
    tokenizer = flux2_tokenizer(klein=klein)
    dit, vae = oracle_dit(config), oracle_autoencoder(AUTOENCODER)
    encoder = (oracle_qwen3 if klein else oracle_mistral)(len(tokenizer))
    for seed, module in enumerate((dit, encoder)):
        module.load_state_dict(draw_weights(shapes_of(module), seed=seed))
    vae.load_state_dict(draw_autoencoder(vae, seed=2))
    ours = {
        "dit": Flux2DiT(config).eval(),
        "vae": Flux2Autoencoder(AUTOENCODER).eval(),
        "text_encoder": (qwen3_of if klein else mistral_of)(encoder),
    }
    ours["dit"].load_state_dict(dit.state_dict())
    ours["vae"].load_state_dict(vae.state_dict())
    pipe = Flux2ImagePipeline.from_components(**ours, tokenizer=tokenizer, device="cpu", torch_dtype=torch.float32)
    parts = {
        "scheduler": FlowMatchEulerDiscreteScheduler(num_train_timesteps=1000, use_dynamic_shifting=True),
        "vae": vae,
        "text_encoder": encoder,
        "tokenizer": tokenizer,
        "transformer": dit,
    }
    return pipe, parts | ({"is_distilled": not guided} if klein else {})


def noise(seed: int, size: dict[str, int] = SIZE) -> torch.Tensor:
    """Return the noise that our pipeline draws for a seed."""
    generator = torch.Generator("cpu").manual_seed(seed)
    shape = (1, AUTOENCODER.packed_channels, size["height"] // 16, size["width"] // 16)
    return torch.randn(*shape, generator=generator)


def packed(latents: torch.Tensor, vae: AutoencoderKLFlux2) -> torch.Tensor:
    """Return the packed, normalised latents of diffusers' latents before decoding, by its formula."""
    batch, channels, height, width = latents.shape
    patches = latents.view(batch, channels, height // 2, 2, width // 2, 2).permute(0, 1, 3, 5, 2, 4)
    mean, std = vae.bn.running_mean, (vae.bn.running_var + vae.config.batch_norm_eps).sqrt()
    return (patches.reshape(batch, -1, height // 2, width // 2) - mean[:, None, None]) / std[:, None, None]
