"""Declarations of diffsynth-unet. Imports no torch: code is named by string and imported on first use."""

from diffsynth import hookimpl
from diffsynth.spec import ArchitectureSpec, CheckpointSpec, ModelSpec

DIFFSYNTH_API = 2
WEIGHTS = "package://diffsynth_unet/diffusion_pytorch_model.safetensors"


@hookimpl
def register_models(register):
    register(
        ModelSpec(
            name="unet-1",
            family="unet",
            task="unconditional-image-generation",
            pipeline="diffsynth_unet.pipeline:UNetPipeline",
            components={"unet": WEIGHTS},
            description="random weights; shows how a network of diffusers is declared",
        )
    )


@hookimpl
def register_architectures(register):
    register(
        ArchitectureSpec(
            name="diffusers_unet",
            module="diffsynth_unet.unet:UNet",
            config="diffsynth_unet.config:UNetConfig",
            infer_config="diffsynth_unet.config:infer_config",
            required=("unet.conv_in.weight", "unet.down_blocks.{n}.resnets.0.conv1.weight", "unet.conv_out.weight"),
            tiny="diffsynth_unet.config:TINY",
            tiny_inputs="diffsynth_unet.config:tiny_inputs",
            repeated_blocks=("unet.down_blocks", "unet.up_blocks"),
            cached_blocks=(),  # their results also go to later blocks, which a step cache does not see
            lora_targets=("to_q", "to_k", "to_v", "to_out.0"),
        )
    )


@hookimpl
def register_checkpoints(register):
    register(CheckpointSpec(name="diffusers_unet", architecture="diffusers_unet"))
    published = CheckpointSpec(
        name="diffusers_unet/diffusers",
        architecture="diffusers_unet",
        rules="diffsynth_unet.convert:RULES",
        files=(WEIGHTS,),
        file_stem="diffusion_pytorch_model",
    )
    register(published)
