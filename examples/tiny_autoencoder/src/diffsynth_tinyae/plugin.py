"""Declarations of diffsynth-tinyae. Imports no torch: code is named by string and imported on first use."""

from diffsynth import hookimpl
from diffsynth.spec import ArchitectureSpec, CheckpointSpec

DIFFSYNTH_API = 2


@hookimpl
def register_architectures(register):
    register(
        ArchitectureSpec(
            name="tiny_autoencoder",
            module="diffsynth_tinyae.vae:TinyAutoencoder",
            config="diffsynth_tinyae.config:TinyAutoencoderConfig",
            infer_config="diffsynth_tinyae.config:infer_config",
            required=("encoder.layers.0.weight", "decoder.layers.0.weight", "decoder.layers.2.conv.0.weight"),
            tiny="diffsynth_tinyae.config:TINY",
            tiny_inputs="diffsynth_tinyae.config:tiny_inputs",
            repeated_blocks=("encoder.layers", "decoder.layers"),
            accepted_as=("flux_autoencoder",),
        )
    )


@hookimpl
def register_checkpoints(register):
    # The files use the network's own names; those without our metadata are recognised by their shapes.
    register(CheckpointSpec(name="tiny_autoencoder", architecture="tiny_autoencoder"))
