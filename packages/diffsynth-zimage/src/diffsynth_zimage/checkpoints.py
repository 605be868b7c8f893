"""Z-Image's architecture and the published files that hold it."""

from __future__ import annotations

from diffsynth.spec import ArchitectureSpec, CheckpointSpec

LORA_TARGETS = ("to_q", "to_k", "to_v", "to_out.0", "w1", "w2", "w3")

ARCHITECTURES = (
    ArchitectureSpec(
        name="z_image_dit",
        module="diffsynth_zimage.dit:ZImageDiT",
        config="diffsynth_zimage.config:ZImageDiTConfig",
        infer_config="diffsynth_zimage.config:infer_dit_config",
        required=(
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
        ),
        tiny="diffsynth_zimage.config:TINY_DIT",
        tiny_inputs="diffsynth_zimage.config:tiny_dit_inputs",
        high_precision=("t_embedder.*", "cap_embedder.*", "*norm*", "*_pad_token"),
        repeated_blocks=("noise_refiner", "context_refiner", "layers"),
        lora_targets=LORA_TARGETS,
    ),
)

CHECKPOINTS = (
    CheckpointSpec(
        name="z_image_dit",
        architecture="z_image_dit",
        signature="fc3a8a1247fe185ce116ccbe0e426c28",
        layout="diffsynth_zimage:layouts/z_image_turbo_dit.json.gz",
        files=("Tongyi-MAI/Z-Image-Turbo:transformer/*.safetensors", "Tongyi-MAI/Z-Image:transformer/*.safetensors"),
        file_stem="diffusion_pytorch_model",
    ),
    CheckpointSpec(
        name="z_image_dit/fused",
        architecture="z_image_dit",
        rules="diffsynth_zimage.convert:FUSED",
    ),
)
