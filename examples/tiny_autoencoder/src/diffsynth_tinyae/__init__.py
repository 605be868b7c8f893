"""Tiny autoencoder for diffsynth, in place of the autoencoder of FLUX.1."""
