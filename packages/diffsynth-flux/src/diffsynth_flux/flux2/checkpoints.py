"""FLUX.2's architectures and the published files that hold them."""

from __future__ import annotations

from diffsynth.spec import ArchitectureSpec, CheckpointSpec, LoRASpelling

DIT = "flux2_dit"
AUTOENCODER = "flux2_autoencoder"
TEXT_ENCODER = "mistral_text_encoder"

DEV = "black-forest-labs/FLUX.2-dev"
KLEIN_4B = "black-forest-labs/FLUX.2-klein-4B"
KLEIN_9B = "black-forest-labs/FLUX.2-klein-9B"
KLEIN_9B_KV = "black-forest-labs/FLUX.2-klein-9b-kv"
KLEIN_BASE_4B = "black-forest-labs/FLUX.2-klein-base-4B"
KLEIN_BASE_9B = "black-forest-labs/FLUX.2-klein-base-9B"

LORA_TARGETS = (
    "to_q",
    "to_k",
    "to_v",
    "to_out.0",
    "add_q_proj",
    "add_k_proj",
    "add_v_proj",
    "to_add_out",
    "linear_in",
    "linear_out",
    "to_qkv_mlp_proj",
    "attn.to_out",
)

# Our names are those of diffusers. kohya and ai-toolkit have the network of the original code.
LORA_SPELLINGS = (
    LoRASpelling(name="ai-toolkit", layout=f"{DIT}/original", prefix="diffusion_model."),
    LoRASpelling(name="comfyui", layout=f"{DIT}/original", prefix="diffusion_model."),
    LoRASpelling.kohya("lora_unet_", layout=f"{DIT}/original"),
    LoRASpelling.kohya("lora_transformer_", name="onetrainer"),
)

_CONFIG = "diffsynth_flux.flux2.config"

ARCHITECTURES = (
    ArchitectureSpec(
        name=DIT,
        module="diffsynth_flux.flux2.dit:Flux2DiT",
        config=f"{_CONFIG}:Flux2DiTConfig",
        infer_config=f"{_CONFIG}:infer_dit_config",
        required=(
            "x_embedder.weight",
            "context_embedder.weight",
            "time_guidance_embed.timestep_embedder.linear_1.weight",
            "double_stream_modulation_img.linear.weight",
            "double_stream_modulation_txt.linear.weight",
            "single_stream_modulation.linear.weight",
            "transformer_blocks.{n}.attn.to_q.weight",
            "transformer_blocks.{n}.attn.norm_q.weight",
            "transformer_blocks.{n}.attn.add_q_proj.weight",
            "transformer_blocks.{n}.ff.linear_out.weight",
            "single_transformer_blocks.{n}.attn.to_qkv_mlp_proj.weight",
            "norm_out.linear.weight",
            "proj_out.weight",
        ),
        tiny=f"{_CONFIG}:TINY_DIT",
        tiny_inputs=f"{_CONFIG}:tiny_dit_inputs",
        high_precision=("time_guidance_embed.*", "*norm_*q.weight", "*norm_*k.weight"),
        repeated_blocks=("transformer_blocks", "single_transformer_blocks"),
        lora_targets=LORA_TARGETS,
        lora_spellings=LORA_SPELLINGS,
    ),
    ArchitectureSpec(
        name=AUTOENCODER,
        module="diffsynth_flux.flux2.autoencoder:Flux2Autoencoder",
        config=f"{_CONFIG}:Flux2AutoencoderConfig",
        infer_config=f"{_CONFIG}:infer_autoencoder_config",
        required=(
            "encoder.conv_in.weight",
            "encoder.down_blocks.{n}.resnets.0.conv1.weight",
            "encoder.mid_block.attentions.0.to_q.weight",
            "encoder.conv_out.weight",
            "quant_conv.weight",
            "post_quant_conv.weight",
            "decoder.conv_in.weight",
            "decoder.mid_block.attentions.0.to_q.weight",
            "decoder.up_blocks.{n}.resnets.0.conv1.weight",
            "decoder.conv_out.weight",
            "bn.running_mean",
            "bn.running_var",
        ),
        tiny=f"{_CONFIG}:TINY_AUTOENCODER",
        tiny_inputs=f"{_CONFIG}:tiny_autoencoder_inputs",
        high_precision=("*norm*", "bn.*"),
        repeated_blocks=("encoder.down_blocks", "decoder.up_blocks"),
    ),
    ArchitectureSpec(
        name=TEXT_ENCODER,
        module="diffsynth_flux.flux2.text_encoders:MistralTextEncoder",
        config=f"{_CONFIG}:MistralTextEncoderConfig",
        infer_config=f"{_CONFIG}:infer_mistral_config",
        required=(
            "language_model.model.embed_tokens.weight",
            "language_model.model.layers.{n}.self_attn.q_proj.weight",
            "language_model.model.layers.{n}.self_attn.k_proj.weight",
            "language_model.model.layers.{n}.mlp.gate_proj.weight",
            "language_model.model.norm.weight",
        ),
        tiny=f"{_CONFIG}:TINY_MISTRAL",
        tiny_inputs=f"{_CONFIG}:tiny_mistral_inputs",
        high_precision=("*norm*",),
        repeated_blocks=("language_model.model.layers",),
    ),
)

_RULES = "diffsynth_flux.flux2.convert"
_LAYOUTS = "diffsynth_flux:layouts"

CHECKPOINTS = (
    CheckpointSpec(
        name=DIT,
        architecture=DIT,
        signature="d38e1d5c5aec3b0a11e79327ac6e3b0f",
        layout=f"{_LAYOUTS}/flux2_dev_dit.json.gz",
        files=(f"{DEV}:transformer/*.safetensors",),
        file_stem="diffusion_pytorch_model",
    ),
    CheckpointSpec(
        name=f"{DIT}/klein",
        architecture=DIT,
        signature="3bde7b817fec8143028b6825a63180df",
        layout=f"{_LAYOUTS}/flux2_klein_4b_dit.json.gz",
        files=(f"{KLEIN_4B}:transformer/*.safetensors", f"{KLEIN_BASE_4B}:transformer/*.safetensors"),
        file_stem="diffusion_pytorch_model",
    ),
    CheckpointSpec(
        name=f"{DIT}/klein_9b",
        architecture=DIT,
        signature="39c6fc48f07bebecedbbaa971ff466c8",
        layout=f"{_LAYOUTS}/flux2_klein_9b_dit.json.gz",
        files=tuple(f"{model}:transformer/*.safetensors" for model in (KLEIN_9B, KLEIN_9B_KV, KLEIN_BASE_9B)),
        file_stem="diffusion_pytorch_model",
    ),
    CheckpointSpec(
        name=f"{DIT}/original",
        architecture=DIT,
        rules=f"{_RULES}:ORIGINAL_DIT",
        files=(f"{DEV}:flux2-dev.safetensors", f"{KLEIN_4B}:flux-2-klein-4b.safetensors"),
    ),
    CheckpointSpec(
        name=f"{DIT}/fused_lora",
        architecture=DIT,
        rules=f"{_RULES}:FUSED_LORA",
        loras_only=True,
    ),
    CheckpointSpec(
        name=AUTOENCODER,
        architecture=AUTOENCODER,
        signature="c54288e3ee12ca215898840682337b95",
        layout=f"{_LAYOUTS}/flux2_autoencoder.json.gz",
        files=tuple(f"{model}:vae/diffusion_pytorch_model.safetensors" for model in (DEV, KLEIN_4B, KLEIN_9B)),
    ),
    CheckpointSpec(
        name=f"{AUTOENCODER}/original",
        architecture=AUTOENCODER,
        rules=f"{_RULES}:ORIGINAL_AUTOENCODER",
        files=(f"{DEV}:ae.safetensors",),
    ),
    CheckpointSpec(
        name=TEXT_ENCODER,
        architecture=TEXT_ENCODER,
        rules=f"{_RULES}:MISTRAL",
        signature="28fca3d8e5bf2a2d1271748a773f6757",
        layout=f"{_LAYOUTS}/flux2_dev_text_encoder.json.gz",
        files=(f"{DEV}:text_encoder/*.safetensors",),
    ),
)
