"""FLUX.1 (Black Forest Labs 2024): networks, text encoders and the pipeline `FluxImagePipeline`."""
