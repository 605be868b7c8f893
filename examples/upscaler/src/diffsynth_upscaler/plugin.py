"""Declarations of diffsynth-upscaler. Imports no torch: code is named by string and imported on first use."""

from diffsynth import hookimpl
from diffsynth.spec import ArchitectureSpec, CheckpointSpec, FeatureSpec

DIFFSYNTH_API = 2


@hookimpl
def register_architectures(register):
    register(
        ArchitectureSpec(
            name="upscaler",
            module="diffsynth_upscaler.upscaler:Upscaler",
            config="diffsynth_upscaler.config:UpscalerConfig",
            infer_config="diffsynth_upscaler.config:infer_config",
            required=("first.weight", "last.weight", "blocks.{n}.conv1.weight", "blocks.{n}.conv2.weight"),
            tiny="diffsynth_upscaler.config:TINY",
            tiny_inputs="diffsynth_upscaler.config:tiny_inputs",
            repeated_blocks=("blocks",),
        )
    )


@hookimpl
def register_checkpoints(register):
    register(CheckpointSpec(name="upscaler", architecture="upscaler"))


@hookimpl
def register_features(register):
    # A family in place of one pipeline class; a spec with neither adds to every pipeline that has what it reads.
    register(FeatureSpec(family="z-image", feature="diffsynth_upscaler.upscale:UPSCALE"))
