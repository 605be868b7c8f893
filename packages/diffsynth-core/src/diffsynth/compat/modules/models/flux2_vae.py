"""Door: the autoencoder of FLUX.2."""

from __future__ import annotations

from diffsynth.compat.doors import door, use

__getattr__ = door(__name__, absent={"Flux2VAE": use("the autoencoder of a loaded pipeline, pipe.vae")})
