"""The architectures that two or more families use, and the published files that hold them."""

from __future__ import annotations

from diffsynth.spec import ArchitectureSpec, CheckpointSpec

FLUX_AUTOENCODER = ArchitectureSpec(
    name="flux_autoencoder",
    module="diffsynth.models.flux_autoencoder:FluxAutoencoder",
    config="diffsynth.models.config:FluxAutoencoderConfig",
    infer_config="diffsynth.models.config:infer_flux_autoencoder_config",
    required=(
        "encoder.conv_in.weight",
        "encoder.down_blocks.{n}.resnets.0.conv1.weight",
        "encoder.mid_block.attentions.0.to_q.weight",
        "encoder.conv_out.weight",
        "decoder.conv_in.weight",
        "decoder.mid_block.attentions.0.to_q.weight",
        "decoder.up_blocks.{n}.resnets.0.conv1.weight",
        "decoder.conv_out.weight",
    ),
    tiny="diffsynth.models.config:TINY_FLUX_AUTOENCODER",
    tiny_inputs="diffsynth.models.config:tiny_flux_autoencoder_inputs",
    high_precision=("*norm*",),
    repeated_blocks=("encoder.down_blocks", "decoder.up_blocks"),
)

QWEN3_TEXT_ENCODER = ArchitectureSpec(
    name="qwen3_text_encoder",
    module="diffsynth.models.qwen3:Qwen3TextEncoder",
    config="diffsynth.models.config:Qwen3TextEncoderConfig",
    infer_config="diffsynth.models.config:infer_qwen3_text_encoder_config",
    required=(
        "model.embed_tokens.weight",
        "model.layers.{n}.self_attn.q_proj.weight",
        "model.layers.{n}.self_attn.k_proj.weight",
        "model.layers.{n}.self_attn.q_norm.weight",
        "model.layers.{n}.mlp.gate_proj.weight",
        "model.norm.weight",
    ),
    tiny="diffsynth.models.config:TINY_QWEN3_TEXT_ENCODER",
    tiny_inputs="diffsynth.models.config:tiny_qwen3_text_encoder_inputs",
    high_precision=("*norm*",),
    repeated_blocks=("model.layers",),
)

QWEN25_VL_TEXT_ENCODER = ArchitectureSpec(
    name="qwen2.5_vl_text_encoder",
    module="diffsynth.models.qwen25_vl:Qwen25VLTextEncoder",
    config="diffsynth.models.config:Qwen25VLTextEncoderConfig",
    infer_config="diffsynth.models.config:infer_qwen25_vl_text_encoder_config",
    required=(
        "model.embed_tokens.weight",
        "model.layers.{n}.self_attn.q_proj.weight",
        "model.layers.{n}.self_attn.q_proj.bias",
        "model.layers.{n}.self_attn.k_proj.weight",
        "model.layers.{n}.mlp.gate_proj.weight",
        "model.norm.weight",
        "visual.patch_embed.proj.weight",
        "visual.blocks.{n}.attn.qkv.weight",
        "visual.blocks.{n}.mlp.gate_proj.weight",
        "visual.merger.ln_q.weight",
    ),
    tiny="diffsynth.models.config:TINY_QWEN25_VL_TEXT_ENCODER",
    tiny_inputs="diffsynth.models.config:tiny_qwen25_vl_text_encoder_inputs",
    high_precision=("*norm*", "*ln_q*", "visual.patch_embed.*"),
    repeated_blocks=("model.layers", "visual.blocks"),
)

WAN_AUTOENCODER = ArchitectureSpec(
    name="wan_autoencoder",
    module="diffsynth.models.wan_autoencoder:WanAutoencoder",
    config="diffsynth.models.config:WanAutoencoderConfig",
    infer_config="diffsynth.models.config:infer_wan_autoencoder_config",
    required=(
        "encoder.conv1.weight",
        "encoder.downsamples.0.residual.2.weight",
        "encoder.middle.1.to_qkv.weight",
        "encoder.head.2.weight",
        "conv1.weight",
        "conv2.weight",
        "decoder.conv1.weight",
        "decoder.middle.1.to_qkv.weight",
        "decoder.upsamples.0.residual.2.weight",
        "decoder.head.2.weight",
    ),
    tiny="diffsynth.models.config:TINY_WAN_AUTOENCODER",
    tiny_inputs="diffsynth.models.config:tiny_wan_autoencoder_inputs",
    high_precision=("*.gamma",),
    repeated_blocks=("encoder.downsamples", "decoder.upsamples"),
)

SIGLIP_IMAGE_ENCODER = ArchitectureSpec(
    name="siglip_image_encoder",
    module="diffsynth.models.siglip:SiglipImageEncoder",
    config="diffsynth.models.image_config:SiglipImageEncoderConfig",
    infer_config="diffsynth.models.image_config:infer_siglip_config",
    required=(
        "vision_model.embeddings.patch_embedding.weight",
        "vision_model.embeddings.patch_embedding.bias",
        "vision_model.embeddings.position_embedding.weight",
        "vision_model.encoder.layers.{n}.self_attn.q_proj.weight",
        "vision_model.encoder.layers.{n}.mlp.fc1.weight",
        "vision_model.post_layernorm.weight",
    ),
    tiny="diffsynth.models.image_config:TINY_SIGLIP",
    tiny_inputs="diffsynth.models.image_config:tiny_siglip_inputs",
    # torch's attention, in the head, reads the weights of its output projection.
    atomic=("torch.nn:MultiheadAttention",),
    high_precision=("*norm*",),
    repeated_blocks=("vision_model.encoder.layers",),
)

DINOV3_IMAGE_ENCODER = ArchitectureSpec(
    name="dinov3_image_encoder",
    module="diffsynth.models.dinov3:Dinov3ImageEncoder",
    config="diffsynth.models.image_config:Dinov3ImageEncoderConfig",
    infer_config="diffsynth.models.image_config:infer_dinov3_config",
    required=(
        "embeddings.cls_token",
        "embeddings.register_tokens",
        "embeddings.patch_embeddings.weight",
        "layer.{n}.attention.q_proj.weight",
        "layer.{n}.layer_scale1.lambda1",
        "layer.{n}.mlp.gate_proj.weight",
        "norm.weight",
    ),
    tiny="diffsynth.models.image_config:TINY_DINOV3",
    tiny_inputs="diffsynth.models.image_config:tiny_dinov3_inputs",
    high_precision=("*norm*", "*_token", "*_tokens", "*.lambda1"),
    repeated_blocks=("layer",),
)

ARCHITECTURES = (
    FLUX_AUTOENCODER,
    QWEN3_TEXT_ENCODER,
    QWEN25_VL_TEXT_ENCODER,
    WAN_AUTOENCODER,
    SIGLIP_IMAGE_ENCODER,
    DINOV3_IMAGE_ENCODER,
)

CHECKPOINTS = (
    CheckpointSpec(
        name="flux_autoencoder",
        architecture="flux_autoencoder",
        signature="1aafa3cc91716fb6b300cc1cd51b85a3",
        layout="diffsynth.models:layouts/z_image_turbo_autoencoder.json.gz",
        files=("Tongyi-MAI/Z-Image-Turbo:vae/diffusion_pytorch_model.safetensors",),
    ),
    CheckpointSpec(
        name="flux_autoencoder/original",
        architecture="flux_autoencoder",
        rules="diffsynth.models.convert:FLUX_AUTOENCODER_ORIGINAL",
        signature="21ea55f476dfc4fd135587abb59dfe5d",
        layout="diffsynth.models:layouts/flux1_dev_autoencoder.json.gz",
        files=(
            "black-forest-labs/FLUX.1-dev:ae.safetensors",
            "black-forest-labs/FLUX.1-schnell:ae.safetensors",
            "black-forest-labs/FLUX.1-Fill-dev:ae.safetensors",
        ),
        file_stem="ae",
    ),
    CheckpointSpec(
        name="qwen3_text_encoder",
        architecture="qwen3_text_encoder",
        signature="0f050f62a88876fea6eae0a18dac5a2e",
        layout="diffsynth.models:layouts/qwen3_4b.json.gz",
        files=(
            "Tongyi-MAI/Z-Image-Turbo:text_encoder/*.safetensors",
            "black-forest-labs/FLUX.2-klein-4B:text_encoder/*.safetensors",
        ),
    ),
    CheckpointSpec(
        name="qwen3_text_encoder/with_head",
        architecture="qwen3_text_encoder",
        rules="diffsynth.models.convert:QWEN3_WITH_HEAD",
        signature="9195f3ea256fcd0ae6d929c203470754",
        layout="diffsynth.models:layouts/qwen3_8b_with_head.json.gz",
        files=("black-forest-labs/FLUX.2-klein-9B:text_encoder/*.safetensors",),
    ),
    CheckpointSpec(
        name="qwen2.5_vl_text_encoder",
        architecture="qwen2.5_vl_text_encoder",
        rules="diffsynth.models.convert:QWEN25_VL",
        signature="8004730443f55db63092006dd9f7110e",
        layout="diffsynth.models:layouts/qwen2.5_vl_7b.json.gz",
        files=(
            *(
                f"Qwen/{model}:text_encoder/model*.safetensors"
                for model in (
                    "Qwen-Image",
                    "Qwen-Image-2512",
                    "Qwen-Image-Edit",
                    "Qwen-Image-Edit-2509",
                    "Qwen-Image-Edit-2511",
                    "Qwen-Image-Layered",
                )
            ),
            "Qwen/Qwen2.5-VL-7B-Instruct:model-*.safetensors",
        ),
        file_stem="model",
    ),
    CheckpointSpec(
        name="qwen2.5_vl_text_encoder/nested",
        architecture="qwen2.5_vl_text_encoder",
        rules="diffsynth.models.convert:QWEN25_VL_NESTED",
    ),
    CheckpointSpec(
        name="wan_autoencoder",
        architecture="wan_autoencoder",
        signature="ccc42284ea13e1ad04693284c7a09be6",
        layout="diffsynth.models:layouts/wan2.1_autoencoder.json.gz",
        files=(
            "Wan-AI/Wan2.1-T2V-1.3B:Wan2.1_VAE.pth",
            "Wan-AI/Wan2.1-T2V-14B:Wan2.1_VAE.pth",
            "DiffSynth-Studio/Wan-Series-Converted-Safetensors:Wan2.1_VAE.safetensors",
        ),
    ),
    CheckpointSpec(
        name="wan_autoencoder/diffusers",
        architecture="wan_autoencoder",
        rules="diffsynth.models.convert:WAN_AUTOENCODER_DIFFUSERS",
        signature="ed4ea5824d55ec3107b09815e318123a",
        layout="diffsynth.models:layouts/qwen_image_autoencoder.json.gz",
        files=tuple(
            f"Qwen/{model}:vae/diffusion_pytorch_model.safetensors"
            for model in (
                "Qwen-Image",
                "Qwen-Image-2512",
                "Qwen-Image-Edit",
                "Qwen-Image-Edit-2509",
                "Qwen-Image-Edit-2511",
            )
        ),
    ),
    CheckpointSpec(
        name="wan_autoencoder/diffusers_rgba",
        architecture="wan_autoencoder",
        rules="diffsynth.models.convert:WAN_AUTOENCODER_DIFFUSERS",
        signature="44b39ddc499e027cfb24f7878d7416b9",
        layout="diffsynth.models:layouts/qwen_image_layered_autoencoder.json.gz",
        files=("Qwen/Qwen-Image-Layered:vae/diffusion_pytorch_model.safetensors",),
    ),
    CheckpointSpec(
        name="siglip_image_encoder",
        architecture="siglip_image_encoder",
        signature="6bd5343828144a2135d783519c665e2c",
        layout="diffsynth.models:layouts/siglip_so400m_vision.json.gz",
        files=("black-forest-labs/FLUX.1-Redux-dev:image_encoder/model.safetensors",),
    ),
    CheckpointSpec(
        name="siglip_image_encoder/with_text_encoder",
        architecture="siglip_image_encoder",
        rules="diffsynth.models.convert:SIGLIP",
        signature="04d8c1e20a1f1b25f7434f111992a33f",
        layout="diffsynth.models:layouts/siglip_so400m.json.gz",
        files=("google/siglip-so400m-patch14-384:model.safetensors",),
    ),
    CheckpointSpec(
        name="siglip_image_encoder/vision_only",
        architecture="siglip_image_encoder",
        rules="diffsynth.models.convert:SIGLIP_VISION_ONLY",
        signature="469c78b61e3e31bc9eec0d0af3d3f2f8",
        layout="diffsynth.models:layouts/siglip2_giant_384.json.gz",
        files=("DiffSynth-Studio/General-Image-Encoders:SigLIP2-G384/model.safetensors",),
    ),
    CheckpointSpec(
        name="dinov3_image_encoder",
        architecture="dinov3_image_encoder",
        rules="diffsynth.models.convert:DINOV3",
        signature="5722b5c873720009de96422993b15682",
        layout="diffsynth.models:layouts/dinov3_7b.json.gz",
        files=("DiffSynth-Studio/General-Image-Encoders:DINOv3-7B/model.safetensors",),
    ),
)
