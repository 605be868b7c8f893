"""Declarations of diffsynth-sound. Imports no torch: code is named by string and imported on first use."""

from diffsynth import hookimpl
from diffsynth.spec import ArchitectureSpec, CheckpointSpec, ModelSpec

DIFFSYNTH_API = 2
WEIGHTS = "package://diffsynth_sound/net.safetensors"


@hookimpl
def register_models(register):
    register(
        ModelSpec(
            name="sound-1",
            family="sound",
            task="frequency-to-audio",
            pipeline="diffsynth_sound.pipeline:SoundPipeline",
            components={"net": WEIGHTS},
            description="random weights; shows how a model of sound is declared",
        )
    )


@hookimpl
def register_architectures(register):
    register(
        ArchitectureSpec(
            name="sound_net",
            module="diffsynth_sound.net:SoundNet",
            config="diffsynth_sound.config:SoundNetConfig",
            infer_config="diffsynth_sound.config:infer_config",
            required=("first.weight", "frequency.mlp.0.weight", "blocks.{n}.qkv.weight"),
            tiny="diffsynth_sound.config:TINY",
            tiny_inputs="diffsynth_sound.config:tiny_inputs",
            repeated_blocks=("blocks",),
            lora_targets=("qkv", "out"),
        )
    )


@hookimpl
def register_checkpoints(register):
    register(CheckpointSpec(name="sound_net", architecture="sound_net", files=(WEIGHTS,)))
