"""Declarations of diffsynth-pixelddpm. Imports no torch: code is named by string and imported on first use."""

from diffsynth import hookimpl
from diffsynth.spec import ArchitectureSpec, CheckpointSpec, ModelSpec

DIFFSYNTH_API = 2
WEIGHTS = "package://diffsynth_pixelddpm/unet.safetensors"


@hookimpl
def register_models(register):
    register(
        ModelSpec(
            name="pixel-ddpm",
            family="pixel-ddpm",
            task="class-to-image",
            pipeline="diffsynth_pixelddpm.pipeline:PixelDDPMPipeline",
            components={"unet": WEIGHTS},
            paper="arXiv:2006.11239",
            description="random weights; shows how a class-conditional model on pixels is declared",
        )
    )


@hookimpl
def register_architectures(register):
    register(
        ArchitectureSpec(
            name="pixel_unet",
            module="diffsynth_pixelddpm.unet:PixelUNet",
            config="diffsynth_pixelddpm.config:PixelUNetConfig",
            infer_config="diffsynth_pixelddpm.config:infer_config",
            required=("labels.weight", "first.weight", "down.{n}.condition.weight", "attention.qkv.weight"),
            tiny="diffsynth_pixelddpm.config:TINY",
            tiny_inputs="diffsynth_pixelddpm.config:tiny_inputs",
            repeated_blocks=("down", "up"),
            cached_blocks=(),  # their results also go to later blocks, which a step cache does not see
            lora_targets=("qkv", "out"),
        )
    )


@hookimpl
def register_checkpoints(register):
    register(CheckpointSpec(name="pixel_unet", architecture="pixel_unet", files=(WEIGHTS,)))
