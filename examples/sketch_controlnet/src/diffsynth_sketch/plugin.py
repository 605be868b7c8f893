"""Declarations of diffsynth-sketch. Imports no torch: code is named by string and imported on first use."""

from diffsynth import hookimpl
from diffsynth.spec import ArchitectureSpec, CheckpointSpec, FeatureSpec

DIFFSYNTH_API = 2


@hookimpl
def register_architectures(register):
    register(
        ArchitectureSpec(
            name="sketch_controlnet",
            module="diffsynth_sketch.controlnet:SketchControlNet",
            config="diffsynth_sketch.config:SketchControlNetConfig",
            infer_config="diffsynth_sketch.config:infer_config",
            required=("sketch.weight", "tokens.weight", "blocks.{n}.conv.weight", "blocks.{n}.hint.weight"),
            tiny="diffsynth_sketch.config:TINY",
            tiny_inputs="diffsynth_sketch.config:tiny_inputs",
            repeated_blocks=("blocks",),
            lora_targets=("hint",),
        )
    )


@hookimpl
def register_checkpoints(register):
    register(CheckpointSpec(name="sketch_controlnet", architecture="sketch_controlnet"))


@hookimpl
def register_features(register):
    pipeline = "diffsynth_zimage.pipeline:ZImagePipeline"
    register(FeatureSpec(pipeline=pipeline, feature="diffsynth_sketch.sketch:SKETCH"))
