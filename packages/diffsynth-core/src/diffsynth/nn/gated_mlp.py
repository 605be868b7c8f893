"""Gated activations of feed-forward layers (Shazeer 2020, arXiv:2002.05202).

Plain gelu is not here: after a linear layer, torch's own kernel is a single pass over memory.
"""

from __future__ import annotations

from jaxtyping import Float
from torch import Tensor

from diffsynth.nn import fused, naive


def swiglu(gate: Float[Tensor, "*b f"], up: Float[Tensor, "*b f"]) -> Float[Tensor, "*b f"]:
    """Return the tensor `silu(gate) * up`, of the shape of `up`."""
    out = fused.gated_activation(gate, up, "silu")
    return naive.swiglu(gate, up) if out is None else out


def geglu(gate: Float[Tensor, "*b f"], up: Float[Tensor, "*b f"]) -> Float[Tensor, "*b f"]:
    """Return the tensor `gelu(gate) * up`, of the shape of `up`, with the tanh approximation of gelu."""
    out = fused.gated_activation(gate, up, "gelu")
    return naive.geglu(gate, up) if out is None else out
