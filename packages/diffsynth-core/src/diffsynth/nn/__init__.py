"""Small layers that several networks share, one per file, with their functional forms.

A layer runs as a fused Triton kernel if one can serve the call, else as its reference implementation in
`diffsynth.nn.naive`; `why_not` returns the reason. The functions `rms_norm` and `layer_norm` are in modules of these
names.
"""

from __future__ import annotations

from diffsynth.nn.fused import KERNELS, why_not
from diffsynth.nn.gated_mlp import geglu, swiglu
from diffsynth.nn.layer_norm import LayerNorm
from diffsynth.nn.modulation import gated_residual, modulate
from diffsynth.nn.rms_norm import RMSNorm, rms_norm_rotary
from diffsynth.nn.rope import apply_rotary, rotary_angles, rotary_table
from diffsynth.nn.timestep import TimestepEmbedder, sinusoidal_embedding

__all__ = [
    "KERNELS",
    "LayerNorm",
    "RMSNorm",
    "TimestepEmbedder",
    "apply_rotary",
    "gated_residual",
    "geglu",
    "modulate",
    "rms_norm_rotary",
    "rotary_angles",
    "rotary_table",
    "sinusoidal_embedding",
    "swiglu",
    "why_not",
]
