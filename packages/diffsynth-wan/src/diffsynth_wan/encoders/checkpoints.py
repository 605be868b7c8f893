"""The two encoders and the published files that hold them."""

from __future__ import annotations

from diffsynth.spec import ArchitectureSpec, CheckpointSpec

TEXT_ENCODER_FILE = "models_t5_umt5-xxl-enc-bf16"
IMAGE_ENCODER_FILE = "models_clip_open-clip-xlm-roberta-large-vit-huge-14"
CONVERTED = "DiffSynth-Studio/Wan-Series-Converted-Safetensors"

_WITH_TEXT_ENCODER = (
    "Wan-AI/Wan2.1-T2V-1.3B",
    "Wan-AI/Wan2.1-T2V-14B",
    "Wan-AI/Wan2.1-I2V-14B-480P",
    "Wan-AI/Wan2.1-I2V-14B-720P",
    "Wan-AI/Wan2.1-FLF2V-14B-720P",
    "Wan-AI/Wan2.1-VACE-1.3B",
    "Wan-AI/Wan2.1-VACE-14B",
    "Wan-AI/Wan2.2-T2V-A14B",
    "Wan-AI/Wan2.2-I2V-A14B",
    "Wan-AI/Wan2.2-TI2V-5B",
    "Wan-AI/Wan2.2-Animate-14B",
    "iic/VACE-Wan2.1-1.3B-Preview",
    "PAI/Wan2.1-Fun-1.3B-InP",
    "PAI/Wan2.1-Fun-1.3B-Control",
    "PAI/Wan2.1-Fun-14B-InP",
    "PAI/Wan2.1-Fun-14B-Control",
    "PAI/Wan2.1-Fun-V1.1-1.3B-InP",
    "PAI/Wan2.1-Fun-V1.1-1.3B-Control",
    "PAI/Wan2.1-Fun-V1.1-1.3B-Control-Camera",
    "PAI/Wan2.1-Fun-V1.1-14B-InP",
    "PAI/Wan2.1-Fun-V1.1-14B-Control",
    "PAI/Wan2.1-Fun-V1.1-14B-Control-Camera",
    "PAI/Wan2.2-Fun-A14B-InP",
    "PAI/Wan2.2-Fun-A14B-Control",
    "PAI/Wan2.2-Fun-A14B-Control-Camera",
    "PAI/Wan2.2-VACE-Fun-A14B",
)
_WITH_IMAGE_ENCODER = (
    "Wan-AI/Wan2.1-I2V-14B-480P",
    "Wan-AI/Wan2.1-I2V-14B-720P",
    "Wan-AI/Wan2.1-FLF2V-14B-720P",
    "Wan-AI/Wan2.2-Animate-14B",
    "PAI/Wan2.1-Fun-1.3B-InP",
    "PAI/Wan2.1-Fun-1.3B-Control",
    "PAI/Wan2.1-Fun-14B-InP",
    "PAI/Wan2.1-Fun-14B-Control",
    "PAI/Wan2.1-Fun-V1.1-1.3B-InP",
    "PAI/Wan2.1-Fun-V1.1-1.3B-Control",
    "PAI/Wan2.1-Fun-V1.1-1.3B-Control-Camera",
    "PAI/Wan2.1-Fun-V1.1-14B-InP",
    "PAI/Wan2.1-Fun-V1.1-14B-Control",
    "PAI/Wan2.1-Fun-V1.1-14B-Control-Camera",
)
_ANIMATE_2 = "Wan-AI/Wan2.2-Animate-2-14B:videomodel/Wan-AI"

ARCHITECTURES = (
    ArchitectureSpec(
        name="wan_text_encoder",
        module="diffsynth_wan.encoders.text_encoder:WanTextEncoder",
        config="diffsynth_wan.encoders.config:WanTextEncoderConfig",
        infer_config="diffsynth_wan.encoders.config:infer_text_encoder_config",
        required=(
            "token_embedding.weight",
            "blocks.{n}.norm1.weight",
            "blocks.{n}.attn.q.weight",
            "blocks.{n}.attn.o.weight",
            "blocks.{n}.ffn.gate.0.weight",
            "blocks.{n}.ffn.fc1.weight",
            "blocks.{n}.pos_embedding.embedding.weight",
            "norm.weight",
        ),
        tiny="diffsynth_wan.encoders.config:TINY_TEXT_ENCODER",
        tiny_inputs="diffsynth_wan.encoders.config:tiny_text_encoder_inputs",
        high_precision=("*norm*", "*pos_embedding*"),
        repeated_blocks=("blocks",),
    ),
    ArchitectureSpec(
        name="wan_image_encoder",
        module="diffsynth_wan.encoders.image_encoder:WanImageEncoder",
        config="diffsynth_wan.encoders.config:WanImageEncoderConfig",
        infer_config="diffsynth_wan.encoders.config:infer_image_encoder_config",
        required=(
            "patch_embedding.weight",
            "cls_embedding",
            "pos_embedding",
            "pre_norm.weight",
            "transformer.{n}.norm1.weight",
            "transformer.{n}.attn.to_qkv.weight",
            "transformer.{n}.attn.proj.weight",
            "transformer.{n}.mlp.0.weight",
        ),
        tiny="diffsynth_wan.encoders.config:TINY_IMAGE_ENCODER",
        tiny_inputs="diffsynth_wan.encoders.config:tiny_image_encoder_inputs",
        high_precision=("*norm*", "cls_embedding", "pos_embedding"),
        repeated_blocks=("transformer",),
    ),
)

CHECKPOINTS = (
    CheckpointSpec(
        name="wan_text_encoder",
        architecture="wan_text_encoder",
        signature="9c8818c2cbea55eca56c7b447df170da",
        layout="diffsynth_wan:layouts/umt5_xxl.json.gz",
        files=(
            *(f"{repository}:{TEXT_ENCODER_FILE}.pth" for repository in _WITH_TEXT_ENCODER),
            f"{_ANIMATE_2}/{TEXT_ENCODER_FILE}.pth",
            f"{CONVERTED}:{TEXT_ENCODER_FILE}.safetensors",
        ),
    ),
    CheckpointSpec(
        name="wan_text_encoder/transformers",
        architecture="wan_text_encoder",
        rules="diffsynth_wan.encoders.convert:TEXT_ENCODER_TRANSFORMERS",
    ),
    CheckpointSpec(
        name="wan_text_encoder/transformers_tied",
        architecture="wan_text_encoder",
        rules="diffsynth_wan.encoders.convert:TEXT_ENCODER_TRANSFORMERS_TIED",
    ),
    CheckpointSpec(
        name="wan_image_encoder",
        architecture="wan_image_encoder",
        rules="diffsynth_wan.encoders.convert:IMAGE_ENCODER",
        signature="5941c53e207d62f20f9025686193c40b",
        layout="diffsynth_wan:layouts/clip_vit_h_14.json.gz",
        files=(
            *(f"{repository}:{IMAGE_ENCODER_FILE}.pth" for repository in _WITH_IMAGE_ENCODER),
            f"{_ANIMATE_2}/{IMAGE_ENCODER_FILE}.pth",
            f"{CONVERTED}:{IMAGE_ENCODER_FILE}.safetensors",
        ),
    ),
    CheckpointSpec(
        name="wan_image_encoder/transformers",
        architecture="wan_image_encoder",
        rules="diffsynth_wan.encoders.convert:IMAGE_ENCODER_TRANSFORMERS",
    ),
)
