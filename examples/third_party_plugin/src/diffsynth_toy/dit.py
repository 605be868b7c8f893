"""The network: predicts the clean image from a noisy image and a prompt."""

import torch
from einops import rearrange
from torch import nn

from diffsynth.core.attention import attention
from diffsynth.nn.timestep import TimestepEmbedder, sinusoidal_embedding
from diffsynth_toy.config import HEAD_DIM, PATCH

FREQUENCIES = 12
LETTERS = 27
"""Vocabulary: blank, then a to z."""


class Block(nn.Module):
    """Transformer block: pre-norm self-attention and feed-forward with residual connections."""

    def __init__(self, width):
        super().__init__()
        self.attention_norm = nn.LayerNorm(width)
        self.qkv = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)
        self.feed_forward = nn.Sequential(
            nn.LayerNorm(width), nn.Linear(width, 2 * width), nn.SiLU(), nn.Linear(2 * width, width)
        )

    def forward(self, x):
        """Return the hidden states, `b s e`."""
        q, k, v = rearrange(self.qkv(self.attention_norm(x)), "b s (three n d) -> three b s n d", three=3, d=HEAD_DIM)
        x = x + self.out(rearrange(attention(q, k, v), "b s n d -> b s (n d)"))
        return x + self.feed_forward(x)


class ToyDiT(nn.Module):
    """A transformer over patches of pixels; see `ToyDiTConfig`."""

    def __init__(self, config):
        super().__init__()
        self.config = config
        self.patches = nn.Linear(3 * PATCH**2, config.width)
        self.positions = nn.Linear(2 * FREQUENCIES, config.width)
        self.letters = nn.Embedding(LETTERS, config.width)
        self.time = TimestepEmbedder(config.width, hidden_dim=config.width, frequency_dim=FREQUENCIES)
        self.blocks = nn.ModuleList(Block(config.width) for _ in range(config.depth))
        self.pixels = nn.Sequential(nn.LayerNorm(config.width), nn.Linear(config.width, 3 * PATCH**2))

    def forward(self, pixels, sigma, letters):
        """Predict the clean image, `b 3 h w`.

        Args:
            pixels: noisy image, `b 3 h w`, height and width multiples of 4.
            sigma: noise level in [0, 1], `b`, fp32.
            letters: letters of the prompt as numbers, `b s`; 0 is blank and ignored.
        """
        rows, columns = pixels.shape[2] // PATCH, pixels.shape[3] // PATCH
        x = self.patches(rearrange(pixels, "b c (h p) (w q) -> b (h w) (c p q)", p=PATCH, q=PATCH))
        prompt = (self.letters(letters) * (letters > 0).unsqueeze(-1)).sum(1)
        x = x + self.positions(self._grid(rows, columns, x)) + (prompt + self.time(10 * sigma, dtype=x.dtype))[:, None]
        for block in self.blocks:
            x = block(x)
        return rearrange(self.pixels(x), "b (h w) (c p q) -> b c (h p) (w q)", h=rows, p=PATCH, q=PATCH)

    def _grid(self, rows, columns, like):
        """Position embedding of each patch, `s f`; computed in forward(), so that no buffer must be saved or filled."""
        y = sinusoidal_embedding(torch.arange(rows, device=like.device), FREQUENCIES, max_period=10.0)
        x = sinusoidal_embedding(torch.arange(columns, device=like.device), FREQUENCIES, max_period=10.0)
        pairs = torch.cat((y[:, None].expand(-1, columns, -1), x[None].expand(rows, -1, -1)), dim=-1)
        return rearrange(pairs, "h w f -> (h w) f").to(like.dtype)
