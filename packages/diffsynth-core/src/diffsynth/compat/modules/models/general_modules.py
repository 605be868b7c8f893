"""Door: small layers."""

from __future__ import annotations

from diffsynth.compat.doors import door, use

__getattr__ = door(__name__, absent={"TimestepEmbeddings": use("diffsynth.nn.TimestepEmbedder")})
