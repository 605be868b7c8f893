"""FLUX.2: transformer, autoencoder, text encoders and pipeline of FLUX.2-dev and FLUX.2-klein."""
