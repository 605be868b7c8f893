"""Qwen-Image's architectures and the published files that hold them."""

from __future__ import annotations

from diffsynth.spec import ArchitectureSpec, CheckpointSpec, LoRASpelling

DIT = "qwen_image_dit"

LORA_TARGETS = (
    "to_q",
    "to_k",
    "to_v",
    "to_out.0",
    "add_q_proj",
    "add_k_proj",
    "add_v_proj",
    "to_add_out",
    "img_mod.1",
    "txt_mod.1",
    "img_mlp.net.2",
    "txt_mlp.net.2",
)

# ai-toolkit and lightx2v have the network of diffusers, whose names are ours.
LORA_SPELLINGS = (
    LoRASpelling(name="ai-toolkit", prefix="diffusion_model."),
    LoRASpelling(name="lightx2v", down="lora_down.weight", up="lora_up.weight", alpha="alpha"),
)

HIGH_PRECISION = ("time_text_embed.*", "*norm_*q.weight", "*norm_*k.weight", "txt_norm.*")
"""Names of the parameters that stay in high precision."""

ARCHITECTURES = (
    ArchitectureSpec(
        name=DIT,
        module="diffsynth_qwen_image.dit:QwenImageDiT",
        config="diffsynth_qwen_image.config:QwenImageDiTConfig",
        infer_config="diffsynth_qwen_image.config:infer_dit_config",
        required=(
            "time_text_embed.timestep_embedder.linear_1.weight",
            "txt_norm.weight",
            "img_in.weight",
            "txt_in.weight",
            "transformer_blocks.{n}.img_mod.1.weight",
            "transformer_blocks.{n}.txt_mod.1.weight",
            "transformer_blocks.{n}.attn.norm_q.weight",
            "transformer_blocks.{n}.attn.add_q_proj.weight",
            "transformer_blocks.{n}.img_mlp.net.2.weight",
            "norm_out.linear.weight",
            "proj_out.weight",
        ),
        tiny="diffsynth_qwen_image.config:TINY_DIT",
        tiny_inputs="diffsynth_qwen_image.config:tiny_dit_inputs",
        high_precision=HIGH_PRECISION,
        repeated_blocks=("transformer_blocks",),
        lora_targets=LORA_TARGETS,
        lora_spellings=LORA_SPELLINGS,
    ),
)

VIDEO_EDIT = "qwen_video_edit_dit"

# Files that users have and that this version only names. A plugin that declares a runnable architecture for the same
# layout takes its place.
NAMED = (
    ArchitectureSpec(
        name=VIDEO_EDIT,
        module="",
        config="",
        infer_config="",
        required=(
            "pipe.dit.img_in.weight",
            "pipe.dit.transformer_blocks.{n}.img_mod.1.weight",
            "in_proj.proj.weight",
            "out_proj.proj.weight",
        ),
        tiny="",
        tiny_inputs="",
        not_runnable="the transformer of Qwen-Video-Edit with its projections of video latents",
    ),
)

BASE = "Qwen/Qwen-Image"
BASE_2512 = "Qwen/Qwen-Image-2512"
EDIT = "Qwen/Qwen-Image-Edit"
EDIT_2509 = "Qwen/Qwen-Image-Edit-2509"
EDIT_2511 = "Qwen/Qwen-Image-Edit-2511"
FIRERED_1_0 = "FireRedTeam/FireRed-Image-Edit-1.0"
FIRERED_1_1 = "FireRedTeam/FireRed-Image-Edit-1.1"
DISTILL_FULL = "DiffSynth-Studio/Qwen-Image-Distill-Full"
LAYERED = "Qwen/Qwen-Image-Layered"
LAYERED_CONTROL = "DiffSynth-Studio/Qwen-Image-Layered-Control"

_TRANSFORMER = "transformer/diffusion_pytorch_model*.safetensors"

CHECKPOINTS = (
    CheckpointSpec(
        name=DIT,
        architecture=DIT,
        signature="0319a1cb19835fb510907dd3367c95ff",
        layout="diffsynth_qwen_image:layouts/qwen_image_dit.json.gz",
        files=(
            *(
                f"{model}:{_TRANSFORMER}"
                for model in (BASE, BASE_2512, EDIT, EDIT_2509, EDIT_2511, FIRERED_1_0, FIRERED_1_1)
            ),
            f"{DISTILL_FULL}:diffusion_pytorch_model*.safetensors",
        ),
        file_stem="diffusion_pytorch_model",
    ),
    CheckpointSpec(
        name=f"{DIT}/layered",
        architecture=DIT,
        signature="8dc8cda05de16c73afa755e2c1ce2839",
        layout="diffsynth_qwen_image:layouts/qwen_image_layered_dit.json.gz",
        files=(f"{LAYERED}:{_TRANSFORMER}", f"{LAYERED_CONTROL}:{_TRANSFORMER}"),
        file_stem="diffusion_pytorch_model",
    ),
    CheckpointSpec(
        name=VIDEO_EDIT,
        architecture=VIDEO_EDIT,
        signature="8ae0ca4ab286d00197f08986c7fbbade",
        files=("yunpeng1998/Qwen-Video-Edit:360P/step-30000.safetensors",),
    ),
)
