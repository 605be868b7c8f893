"""Z-Image's architectures and the published files that hold them."""

from __future__ import annotations

from diffsynth.spec import ArchitectureSpec, CheckpointSpec, LoRASpelling

DIT = "z_image_dit"
CONTROLNET = "z_image_controlnet"
IMAGE_TO_LORA = "z_image_image_to_lora"

OMNI_DIT = "z_image_omni_dit"
SIGLIP2 = "siglip2_naflex_image_encoder"

LORA_TARGETS = ("to_q", "to_k", "to_v", "to_out.0", "w1", "w2", "w3")


def _spellings(architecture: str) -> tuple[LoRASpelling, ...]:
    """Return the spellings of an architecture's LoRAs: ai-toolkit has the network of diffusers, whose names are ours;
    kohya has that of the original code.
    """
    kohya = LoRASpelling.kohya("lora_unet_", layout=f"{architecture}/fused")
    return LoRASpelling(name="ai-toolkit", prefix="diffusion_model."), kohya


_REQUIRED = (
    "x_pad_token",
    "cap_pad_token",
    "all_x_embedder.2-1.weight",
    "all_final_layer.2-1.linear.weight",
    "t_embedder.mlp.0.weight",
    "cap_embedder.0.weight",
    "cap_embedder.1.weight",
    "noise_refiner.{n}.adaLN_modulation.0.weight",
    "context_refiner.{n}.attention.to_q.weight",
    "layers.{n}.attention.to_q.weight",
    "layers.{n}.attention.to_k.weight",
    "layers.{n}.attention.norm_q.weight",
    "layers.{n}.feed_forward.w1.weight",
    "layers.{n}.adaLN_modulation.0.weight",
)

ARCHITECTURES = (
    ArchitectureSpec(
        name=DIT,
        module="diffsynth_zimage.dit:ZImageDiT",
        config="diffsynth_zimage.config:ZImageDiTConfig",
        infer_config="diffsynth_zimage.config:infer_dit_config",
        required=_REQUIRED,
        tiny="diffsynth_zimage.config:TINY_DIT",
        tiny_inputs="diffsynth_zimage.config:tiny_dit_inputs",
        high_precision=("t_embedder.*", "cap_embedder.*", "*norm*", "*_pad_token"),
        repeated_blocks=("noise_refiner", "context_refiner", "layers"),
        lora_targets=LORA_TARGETS,
        lora_spellings=_spellings(DIT),
    ),
    ArchitectureSpec(
        name=OMNI_DIT,
        module="diffsynth_zimage.omni:ZImageOmniDiT",
        config="diffsynth_zimage.config:ZImageOmniDiTConfig",
        infer_config="diffsynth_zimage.config:infer_omni_dit_config",
        required=(
            *_REQUIRED,
            "siglip_pad_token",
            "siglip_embedder.1.weight",
            "siglip_refiner.{n}.attention.to_q.weight",
        ),
        tiny="diffsynth_zimage.config:TINY_OMNI_DIT",
        tiny_inputs="diffsynth_zimage.tiny:tiny_omni_inputs",
        high_precision=("t_embedder.*", "cap_embedder.*", "siglip_embedder.*", "*norm*", "*_pad_token"),
        repeated_blocks=("noise_refiner", "context_refiner", "siglip_refiner", "layers"),
        lora_targets=LORA_TARGETS,
        lora_spellings=_spellings(OMNI_DIT),
    ),
    ArchitectureSpec(
        name=SIGLIP2,
        module="diffsynth_zimage.image_encoders:Siglip2ImageEncoder",
        config="diffsynth_zimage.config:Siglip2ImageEncoderConfig",
        infer_config="diffsynth_zimage.config:infer_siglip2_config",
        required=(
            "vision_model.embeddings.patch_embedding.weight",
            "vision_model.embeddings.position_embedding.weight",
            "vision_model.encoder.layers.{n}.self_attn.q_proj.weight",
            "vision_model.encoder.layers.{n}.mlp.fc1.weight",
            "vision_model.post_layernorm.weight",
        ),
        tiny="diffsynth_zimage.config:TINY_SIGLIP2",
        tiny_inputs="diffsynth_zimage.tiny:tiny_siglip2_inputs",
        high_precision=("*norm*",),
        repeated_blocks=("vision_model.encoder.layers",),
    ),
    ArchitectureSpec(
        name=CONTROLNET,
        module="diffsynth_zimage.controlnet:ZImageControlNet",
        config="diffsynth_zimage.config:ZImageControlNetConfig",
        infer_config="diffsynth_zimage.config:infer_controlnet_config",
        required=(
            "control_all_x_embedder.2-1.weight",
            "control_layers.0.before_proj.weight",
            "control_layers.{n}.after_proj.weight",
            "control_layers.{n}.attention.to_q.weight",
            "control_layers.{n}.attention.to_k.weight",
            "control_layers.{n}.attention.norm_q.weight",
            "control_layers.{n}.feed_forward.w1.weight",
            "control_layers.{n}.adaLN_modulation.0.weight",
        ),
        tiny="diffsynth_zimage.config:TINY_CONTROLNET",
        tiny_inputs="diffsynth_zimage.tiny:tiny_controlnet_inputs",
        high_precision=("*norm*",),
        repeated_blocks=("control_noise_refiner", "control_layers"),
        lora_targets=LORA_TARGETS,
    ),
    ArchitectureSpec(
        name=IMAGE_TO_LORA,
        module="diffsynth_zimage.image_to_lora:ZImageImageToLoRA",
        config="diffsynth.models.image_config:ImageToLoRAConfig",
        infer_config="diffsynth_zimage.image_to_lora_config:infer_style_config",
        required=tuple(
            f"{stack}_lora.blocks.{{n}}.layers.0.proj_{matrix}.proj_{end}.weight"
            for stack in ("layers", "context_refiner", "noise_refiner")
            for matrix in ("a", "b")
            for end in ("in", "out")
        ),
        tiny="diffsynth_zimage.image_to_lora_config:TINY_STYLE",
        tiny_inputs="diffsynth.models.image_config:tiny_image_to_lora_inputs",
        repeated_blocks=("layers_lora.blocks", "context_refiner_lora.blocks", "noise_refiner_lora.blocks"),
    ),
)

OMNI_BASE = "Tongyi-MAI/Z-Image-Omni-Base"
_UNION_1_0 = "PAI/Z-Image-Turbo-Fun-Controlnet-Union"
_UNION_2_1 = "PAI/Z-Image-Turbo-Fun-Controlnet-Union-2.1"

CHECKPOINTS = (
    CheckpointSpec(
        name=DIT,
        architecture=DIT,
        signature="fc3a8a1247fe185ce116ccbe0e426c28",
        layout="diffsynth_zimage:layouts/z_image_turbo_dit.json.gz",
        files=("Tongyi-MAI/Z-Image-Turbo:transformer/*.safetensors", "Tongyi-MAI/Z-Image:transformer/*.safetensors"),
        file_stem="diffusion_pytorch_model",
    ),
    CheckpointSpec(
        name="z_image_dit/fused",
        architecture=DIT,
        rules="diffsynth_zimage.convert:FUSED",
    ),
    CheckpointSpec(
        name=OMNI_DIT,
        architecture=OMNI_DIT,
        signature="aa3563718e5c3ecde3dfbb020ca61180",
        layout="diffsynth_zimage:layouts/z_image_omni_dit.json.gz",
        files=(f"{OMNI_BASE}:transformer/*.safetensors",),
        file_stem="diffusion_pytorch_model",
    ),
    CheckpointSpec(
        name=f"{OMNI_DIT}/fused",
        architecture=OMNI_DIT,
        rules="diffsynth_zimage.convert:FUSED_OMNI",
    ),
    CheckpointSpec(
        name=SIGLIP2,
        architecture=SIGLIP2,
        rules="diffsynth_zimage.convert:SIGLIP2",
        signature="89d48e420f45cff95115a9f3e698d44a",
        layout="diffsynth_zimage:layouts/siglip2_naflex_so400m.json.gz",
        files=(f"{OMNI_BASE}:siglip/model.safetensors",),
    ),
    CheckpointSpec(
        name=CONTROLNET,
        architecture=CONTROLNET,
        rules="diffsynth_zimage.convert:CONTROLNET",
        signature="1677708d40029ab380a95f6c731a57d7",
        layout="diffsynth_zimage:layouts/controlnet_union_2.1.json.gz",
        files=(
            f"{_UNION_2_1}:Z-Image-Turbo-Fun-Controlnet-Union-2.1.safetensors",
            f"{_UNION_2_1}:Z-Image-Turbo-Fun-Controlnet-Union-2.1-8steps.safetensors",
            f"{_UNION_2_1}:Z-Image-Turbo-Fun-Controlnet-Tile-2.1-8steps.safetensors",
        ),
    ),
    CheckpointSpec(
        name=f"{CONTROLNET}/lite",
        architecture=CONTROLNET,
        rules="diffsynth_zimage.convert:CONTROLNET",
        files=(
            f"{_UNION_2_1}:Z-Image-Turbo-Fun-Controlnet-Union-2.1-lite-2601-8steps.safetensors",
            f"{_UNION_2_1}:Z-Image-Turbo-Fun-Controlnet-Tile-2.1-lite-2601-8steps.safetensors",
        ),
    ),
    CheckpointSpec(
        name=f"{CONTROLNET}/1.0",
        architecture=CONTROLNET,
        rules="diffsynth_zimage.convert:CONTROLNET",
        files=(f"{_UNION_1_0}:Z-Image-Turbo-Fun-Controlnet-Union.safetensors",),
    ),
    CheckpointSpec(
        name=IMAGE_TO_LORA,
        architecture=IMAGE_TO_LORA,
        signature="9510cb8cd1dd34ee0e4f111c24905510",
        layout="diffsynth_zimage:layouts/image_to_lora.json.gz",
        files=(
            "DiffSynth-Studio/Z-Image-i2L:model.safetensors",
            "DiffSynth-Studio/Z-Image-Omni-Base-i2L:model.safetensors",
        ),
    ),
)
