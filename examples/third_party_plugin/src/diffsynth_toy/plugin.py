"""Declarations of diffsynth-toy. Imports no torch: code is named by string and imported on first use."""

from diffsynth import hookimpl
from diffsynth.spec import ArchitectureSpec, CheckpointSpec, FeatureSpec, ModelSpec

DIFFSYNTH_API = 2
WEIGHTS = "package://diffsynth_toy/dit.safetensors"


@hookimpl
def register_models(register):
    register(
        ModelSpec(
            name="toy-1",
            family="toy",
            task="text-to-image",
            pipeline="diffsynth_toy.pipeline:ToyPipeline",
            components={"dit": WEIGHTS},
            description="generates a disc in the colour that the prompt names",
        )
    )


@hookimpl
def register_architectures(register):
    register(
        ArchitectureSpec(
            name="toy_dit",
            module="diffsynth_toy.dit:ToyDiT",
            config="diffsynth_toy.config:ToyDiTConfig",
            infer_config="diffsynth_toy.config:infer_config",
            required=("patches.weight", "letters.weight", "blocks.{n}.qkv.weight"),
            tiny="diffsynth_toy.config:TINY",
            tiny_inputs="diffsynth_toy.config:tiny_inputs",
            repeated_blocks=("blocks",),
            lora_targets=("qkv", "out"),
        )
    )


@hookimpl
def register_checkpoints(register):
    register(CheckpointSpec(name="toy_dit", architecture="toy_dit", files=(WEIGHTS,)))


@hookimpl
def register_features(register):
    # Named by string: if Z-Image is not installed, this is never imported.
    pipeline = "diffsynth_zimage.pipeline:ZImagePipeline"
    register(FeatureSpec(pipeline=pipeline, feature="diffsynth_toy.mirror:MIRROR"))
