"""The residual autoencoder and the published files that hold it."""

from __future__ import annotations

from diffsynth.spec import ArchitectureSpec, CheckpointSpec

ARCHITECTURES = (
    ArchitectureSpec(
        name="wan22_autoencoder",
        module="diffsynth_wan.autoencoder.vae:Wan22Autoencoder",
        config="diffsynth_wan.autoencoder.config:Wan22AutoencoderConfig",
        infer_config="diffsynth_wan.autoencoder.config:infer_wan22_autoencoder_config",
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
        tiny="diffsynth_wan.autoencoder.config:TINY_WAN22_AUTOENCODER",
        tiny_inputs="diffsynth_wan.autoencoder.config:tiny_wan22_autoencoder_inputs",
        high_precision=("*.gamma",),
        repeated_blocks=("encoder.downsamples", "decoder.upsamples"),
    ),
)

CHECKPOINTS = (
    CheckpointSpec(
        name="wan22_autoencoder",
        architecture="wan22_autoencoder",
        signature="e1de6c02cdac79f8b739f4d3698cd216",
        layout="diffsynth_wan:layouts/wan2.2_autoencoder.json.gz",
        files=(
            "Wan-AI/Wan2.2-TI2V-5B:Wan2.2_VAE.pth",
            "DiffSynth-Studio/Wan-Series-Converted-Safetensors:Wan2.2_VAE.safetensors",
        ),
    ),
    CheckpointSpec(
        name="wan22_autoencoder/diffusers",
        architecture="wan22_autoencoder",
        rules="diffsynth_wan.autoencoder.convert:WAN22_AUTOENCODER_DIFFUSERS",
    ),
)
