"""Door: the autoencoder of FLUX.2."""

from __future__ import annotations

from diffsynth.compat.doors import door, later

__getattr__ = door(__name__, absent={"Flux2VAE": later("the FLUX.2 family")})
