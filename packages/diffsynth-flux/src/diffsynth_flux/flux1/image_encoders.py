"""Projection of FLUX.1-Redux from the hidden states of SigLIP to text tokens."""

from __future__ import annotations

import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from diffsynth_flux.flux1.config import ReduxEmbedderConfig


class ReduxEmbedder(nn.Module):
    """Projection of FLUX.1-Redux. Parameter names are those of the published file."""

    def __init__(self, config: ReduxEmbedderConfig) -> None:
        super().__init__()
        self.config = config
        self.redux_up = nn.Linear(config.image_dim, 3 * config.context_dim)
        self.redux_down = nn.Linear(3 * config.context_dim, config.context_dim)

    def forward(self, hidden: Float[Tensor, "b s e_image"]) -> Float[Tensor, "b s e_text"]:
        """Return the text tokens `b s e_text`, one for each hidden state of the image encoder."""
        return self.redux_down(F.silu(self.redux_up(hidden)))
