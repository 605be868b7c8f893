"""Wan's architectures and the published files that hold them: transformer, variants, encoders, autoencoder."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from diffsynth.spec import ArchitectureSpec, CheckpointSpec, LoRASpelling

DIT = "wan_dit"
VACE = "wan_vace"
ANIMATE = "wan_animate_adapter"
MOTION_CONTROLLER = "wan_motion_controller"

ORIGINAL = "diffusion_pytorch_model*.safetensors"
DIFFUSERS = "transformer/diffusion_pytorch_model*.safetensors"
EXPERTS = (f"high_noise_model/{ORIGINAL}", f"low_noise_model/{ORIGINAL}")

TEXT_ENCODER_FILE = "models_t5_umt5-xxl-enc-bf16"
IMAGE_ENCODER_FILE = "models_clip_open-clip-xlm-roberta-large-vit-huge-14"
CONVERTED = "DiffSynth-Studio/Wan-Series-Converted-Safetensors"
"""Repository that has text encoder, image encoder and autoencoders as safetensors."""

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

_BLOCK = (
    "modulation",
    "self_attn.q.weight",
    "self_attn.o.weight",
    "self_attn.norm_q.weight",
    "cross_attn.q.weight",
    "cross_attn.k.weight",
    "norm3.weight",
    "ffn.0.weight",
    "ffn.2.weight",
)

LORA_TARGETS = ("q", "k", "v", "o", "ffn.0", "ffn.2")

ARCHITECTURES = (
    ArchitectureSpec(
        name=DIT,
        module="diffsynth_wan.dit:WanDiT",
        config="diffsynth_wan.config:WanDiTConfig",
        infer_config="diffsynth_wan.config:infer_dit_config",
        required=(
            "patch_embedding.weight",
            "text_embedding.0.weight",
            "time_embedding.0.weight",
            "time_projection.1.weight",
            "head.modulation",
            "head.head.weight",
            *(f"blocks.{{n}}.{name}" for name in _BLOCK),
        ),
        tiny="diffsynth_wan.tiny:TINY_DIT",
        tiny_inputs="diffsynth_wan.tiny:tiny_dit_inputs",
        high_precision=(
            "patch_embedding.*",
            "text_embedding.*",
            "time_embedding.*",
            "time_projection.*",
            "img_emb.*",
            "head.*",
            "*norm*",
            "*modulation",
        ),
        repeated_blocks=("blocks",),
        lora_targets=LORA_TARGETS,
        lora_spellings=(LoRASpelling(name="diffusers", layout=f"{DIT}/t2v_14b_diffusers", prefix="transformer."),),
    ),
    ArchitectureSpec(
        name=VACE,
        module="diffsynth_wan.variants.vace:WanVace",
        config="diffsynth_wan.config:WanVaceConfig",
        infer_config="diffsynth_wan.config:infer_vace_config",
        required=(
            "vace_patch_embedding.weight",
            "vace_blocks.0.before_proj.weight",
            "vace_blocks.{n}.after_proj.weight",
            *(f"vace_blocks.{{n}}.{name}" for name in _BLOCK),
        ),
        tiny="diffsynth_wan.tiny:TINY_VACE",
        tiny_inputs="diffsynth_wan.tiny:tiny_vace_inputs",
        high_precision=("vace_patch_embedding.*", "*norm*", "*modulation"),
        repeated_blocks=("vace_blocks",),
        lora_targets=LORA_TARGETS,
    ),
    ArchitectureSpec(
        name=ANIMATE,
        module="diffsynth_wan.variants.animate:WanAnimateAdapter",
        config="diffsynth_wan.config:WanAnimateConfig",
        infer_config="diffsynth_wan.config:infer_animate_config",
        required=(
            "pose_patch_embedding.weight",
            "motion_encoder.enc.net_app.convs.0.0.weight",
            "motion_encoder.enc.net_app.convs.1.conv2.1.weight",
            "motion_encoder.enc.fc.{n}.weight",
            "motion_encoder.dec.direction.weight",
            "face_encoder.conv1_local.conv.weight",
            "face_encoder.conv2.conv.weight",
            "face_encoder.padding_tokens",
            "face_adapter.fuser_blocks.{n}.linear1_kv.weight",
            "face_adapter.fuser_blocks.{n}.q_norm.weight",
        ),
        tiny="diffsynth_wan.tiny:TINY_ANIMATE",
        tiny_inputs="diffsynth_wan.tiny:tiny_animate_inputs",
        high_precision=("pose_patch_embedding.*", "motion_encoder.*", "*norm*", "face_encoder.padding_tokens"),
        repeated_blocks=("face_adapter.fuser_blocks",),
    ),
    ArchitectureSpec(
        name=MOTION_CONTROLLER,
        module="diffsynth_wan.variants.speed:WanMotionController",
        config="diffsynth_wan.config:WanMotionControllerConfig",
        infer_config="diffsynth_wan.config:infer_motion_controller_config",
        required=("linear.0.weight", "linear.2.weight", "linear.4.weight"),
        tiny="diffsynth_wan.tiny:TINY_MOTION_CONTROLLER",
        tiny_inputs="diffsynth_wan.tiny:tiny_motion_controller_inputs",
        high_precision=("linear.*",),
    ),
    ArchitectureSpec(
        name="wan_text_encoder",
        module="diffsynth_wan.text_encoder:WanTextEncoder",
        config="diffsynth_wan.config:WanTextEncoderConfig",
        infer_config="diffsynth_wan.config:infer_text_encoder_config",
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
        tiny="diffsynth_wan.tiny:TINY_TEXT_ENCODER",
        tiny_inputs="diffsynth_wan.tiny:tiny_text_encoder_inputs",
        high_precision=("*norm*", "*pos_embedding*"),
        repeated_blocks=("blocks",),
    ),
    ArchitectureSpec(
        name="wan_image_encoder",
        module="diffsynth_wan.image_encoder:WanImageEncoder",
        config="diffsynth_wan.config:WanImageEncoderConfig",
        infer_config="diffsynth_wan.config:infer_image_encoder_config",
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
        tiny="diffsynth_wan.tiny:TINY_IMAGE_ENCODER",
        tiny_inputs="diffsynth_wan.tiny:tiny_image_encoder_inputs",
        high_precision=("*norm*", "cls_embedding", "pos_embedding"),
        repeated_blocks=("transformer",),
    ),
    ArchitectureSpec(
        name="wan22_autoencoder",
        module="diffsynth_wan.vae:Wan22Autoencoder",
        config="diffsynth_wan.config:Wan22AutoencoderConfig",
        infer_config="diffsynth_wan.config:infer_wan22_autoencoder_config",
        required=(
            "encoder.conv1.weight",
            "encoder.downsamples.{n}.downsamples.0.residual.2.weight",
            "encoder.middle.1.to_qkv.weight",
            "encoder.head.2.weight",
            "conv1.weight",
            "conv2.weight",
            "decoder.conv1.weight",
            "decoder.middle.1.to_qkv.weight",
            "decoder.upsamples.{n}.upsamples.0.residual.2.weight",
            "decoder.head.2.weight",
        ),
        tiny="diffsynth_wan.tiny:TINY_WAN22_AUTOENCODER",
        tiny_inputs="diffsynth_wan.tiny:tiny_wan22_autoencoder_inputs",
        high_precision=("*.gamma",),
        repeated_blocks=("encoder.downsamples", "decoder.upsamples"),
    ),
)


def _published(
    layout: str,
    signature: str,
    *files: str,
    architecture: str = DIT,
    rules: str = "",
    config: Mapping[str, Any] | None = None,
) -> CheckpointSpec:
    return CheckpointSpec(
        name=f"{architecture}/{layout}",
        architecture=architecture,
        rules=f"diffsynth_wan.convert:{rules}" if rules else "",
        signature=signature,
        layout=f"diffsynth_wan:layouts/{layout}.json.gz",
        files=files,
        config=config or {},
        file_stem="diffusion_pytorch_model",
    )


def _by_structure(name: str, architecture: str, rules: str, *files: str, **config: Any) -> CheckpointSpec:
    return CheckpointSpec(
        name=f"{architecture}/{name}",
        architecture=architecture,
        rules=f"diffsynth_wan.convert:{rules}",
        files=files,
        config=config,
        file_stem="diffusion_pytorch_model",
    )


def _experts(repository: str) -> tuple[str, ...]:
    return tuple(f"{repository}:{folder}" for folder in EXPERTS)


_VACE_1_3B = (
    "a61453409b67cd3246cf0c3bebad47ba",
    f"Wan-AI/Wan2.1-VACE-1.3B:{ORIGINAL}",
    f"iic/VACE-Wan2.1-1.3B-Preview:{ORIGINAL}",
)
_VACE_14B = (
    "7a513e1f257a861512b1afd387a8ecd9",
    f"Wan-AI/Wan2.1-VACE-14B:{ORIGINAL}",
    *_experts("PAI/Wan2.2-VACE-Fun-A14B"),
)
_ANIMATE_14B = ("31fa352acb8a1b1d33cd8764273d80a2", f"Wan-AI/Wan2.2-Animate-14B:{ORIGINAL}")

CHECKPOINTS = (
    _published("t2v_1.3b", "9269f8db9040a9d860eaca435be61814", f"Wan-AI/Wan2.1-T2V-1.3B:{ORIGINAL}"),
    _published(
        "t2v_14b",
        "aafcfd9672c3a2456dc46e1cb6e52c70",
        f"Wan-AI/Wan2.1-T2V-14B:{ORIGINAL}",
        *_experts("Wan-AI/Wan2.2-T2V-A14B"),
        "krea/krea-realtime-video:krea-realtime-video-14b.safetensors",
    ),
    _published(
        "i2v_14b",
        "6bfcfb3b342cb286ce886889d519a77e",
        f"Wan-AI/Wan2.1-I2V-14B-480P:{ORIGINAL}",
        f"Wan-AI/Wan2.1-I2V-14B-720P:{ORIGINAL}",
        f"PAI/Wan2.1-Fun-14B-InP:{ORIGINAL}",
        f"PAI/Wan2.1-Fun-V1.1-14B-InP:{ORIGINAL}",
    ),
    _published("flf2v_14b", "3ef3b1f8e1dab83d5b71fd7b617f859f", f"Wan-AI/Wan2.1-FLF2V-14B-720P:{ORIGINAL}"),
    _published(
        "i2v_a14b",
        "5b013604280dd715f8457c6ed6d6a626",
        *_experts("Wan-AI/Wan2.2-I2V-A14B"),
        *_experts("PAI/Wan2.2-Fun-A14B-InP"),
    ),
    _published("ti2v_5b", "1f5ab7703c6fc803fdded85ff040c316", f"Wan-AI/Wan2.2-TI2V-5B:{ORIGINAL}"),
    _published(
        "fun_1.3b_inp",
        "6d6ccde6845b95ad9114ab993d917893",
        f"PAI/Wan2.1-Fun-1.3B-InP:{ORIGINAL}",
        f"PAI/Wan2.1-Fun-V1.1-1.3B-InP:{ORIGINAL}",
    ),
    _published("fun_1.3b_control", "349723183fc063b2bfc10bb2835cf677", f"PAI/Wan2.1-Fun-1.3B-Control:{ORIGINAL}"),
    _published("fun_14b_control", "efa44cddf936c70abd0ea28b6cbe946c", f"PAI/Wan2.1-Fun-14B-Control:{ORIGINAL}"),
    _published(
        "fun_1.3b_control_ref", "70ddad9d3a133785da5ea371aae09504", f"PAI/Wan2.1-Fun-V1.1-1.3B-Control:{ORIGINAL}"
    ),
    _published(
        "fun_14b_control_ref", "26bde73488a92e64cc20b0a7485b9e5b", f"PAI/Wan2.1-Fun-V1.1-14B-Control:{ORIGINAL}"
    ),
    _published("fun_a14b_control", "2267d489f0ceb9f21836532952852ee5", *_experts("PAI/Wan2.2-Fun-A14B-Control")),
    _published(
        "fun_1.3b_camera", "ac6a5aa74f4a0aab6f64eb9a72f19901", f"PAI/Wan2.1-Fun-V1.1-1.3B-Control-Camera:{ORIGINAL}"
    ),
    _published(
        "fun_14b_camera", "b61c605c2adbd23124d152ed28e049ae", f"PAI/Wan2.1-Fun-V1.1-14B-Control-Camera:{ORIGINAL}"
    ),
    _published("fun_a14b_camera", "47dbeab5e560db3180adf51dc0232fb1", *_experts("PAI/Wan2.2-Fun-A14B-Control-Camera")),
    _published("vace_1.3b", *_VACE_1_3B, rules="WITHOUT_VACE"),
    _published("vace_1.3b", *_VACE_1_3B, architecture=VACE, rules="WITHOUT_NETWORK"),
    _published("vace_14b", *_VACE_14B, rules="WITHOUT_VACE"),
    _published("vace_14b", *_VACE_14B, architecture=VACE, rules="WITHOUT_NETWORK"),
    _published("animate_14b", *_ANIMATE_14B, rules="WITHOUT_ANIMATE"),
    _published("animate_14b", *_ANIMATE_14B, architecture=ANIMATE, rules="WITHOUT_NETWORK"),
    _published(
        "animate_2_14b",
        "4536c21ad8740ba78367af4216ae85bf",
        "Wan-AI/Wan2.2-Animate-2-14B:wan_animate_2/wan_animate_2_bf16.safetensors",
        "Wan-AI/Wan2.2-Animate-2-14B:wan_animate_2/wan_animate_2_bf16_distillation.safetensors",
        rules="ANIMATE_2",
        config={"reference_video": True},
    ),
    _published(
        "speed_control_1.3b",
        "dbd5ec76bbf977983f972c151d545389",
        "DiffSynth-Studio/Wan2.1-1.3b-speedcontrol-v1:model.safetensors",
        architecture=MOTION_CONTROLLER,
    ),
    _published("t2v_14b_diffusers", "cb104773c6c2cb6df4f9529ad5c60d0b", rules="DIFFUSERS"),
    _by_structure("diffusers_with_vace", DIT, "DIFFUSERS_WITHOUT_VACE"),
    _by_structure("diffusers", VACE, "DIFFUSERS_VACE"),
    _by_structure("diffusers_with_animate", DIT, "DIFFUSERS_WITHOUT_ANIMATE"),
    _by_structure("diffusers", ANIMATE, "DIFFUSERS_ANIMATE"),
    _by_structure("animate_2_diffusers", DIT, "DIFFUSERS_ANIMATE_2", reference_video=True),
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
        rules="diffsynth_wan.convert:TEXT_ENCODER_TRANSFORMERS",
    ),
    CheckpointSpec(
        name="wan_text_encoder/transformers_tied",
        architecture="wan_text_encoder",
        rules="diffsynth_wan.convert:TEXT_ENCODER_TRANSFORMERS_TIED",
    ),
    CheckpointSpec(
        name="wan_image_encoder",
        architecture="wan_image_encoder",
        rules="diffsynth_wan.convert:IMAGE_ENCODER",
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
        rules="diffsynth_wan.convert:IMAGE_ENCODER_TRANSFORMERS",
    ),
    CheckpointSpec(
        name="wan22_autoencoder",
        architecture="wan22_autoencoder",
        signature="e1de6c02cdac79f8b739f4d3698cd216",
        layout="diffsynth_wan:layouts/wan2.2_autoencoder.json.gz",
        files=(
            "Wan-AI/Wan2.2-TI2V-5B:Wan2.2_VAE.pth",
            f"{CONVERTED}:Wan2.2_VAE.safetensors",
        ),
    ),
    CheckpointSpec(
        name="wan22_autoencoder/diffusers",
        architecture="wan22_autoencoder",
        rules="diffsynth_wan.convert:WAN22_AUTOENCODER_DIFFUSERS",
    ),
)
