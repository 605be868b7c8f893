"""FLUX.1 and FLUX.2 for diffsynth: networks, text encoders and pipelines."""
