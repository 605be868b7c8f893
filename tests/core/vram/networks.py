"""Small networks with everything that makes wrapping hard."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class Layer(nn.Module):
    """A block whose weights differ in shape, dtype order and stride."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.up = nn.Linear(width, 2 * width)
        self.down = nn.Linear(2 * width, width, bias=False)
        self.register_buffer("calls", torch.zeros((), dtype=torch.int64))

    def forward(self, x: Tensor) -> Tensor:
        """A residual step; counts its calls in a buffer."""
        self.calls += 1
        return x + self.down(torch.nn.functional.silu(self.up(self.norm(x))))


class Tower(nn.Module):
    """Embedding, blocks, a parameter of its own, a tied head, a whole module beside the list."""

    def __init__(self, width: int = 32, depth: int = 6, words: int = 40) -> None:
        super().__init__()
        self.embed = nn.Embedding(words, width)
        self.start = nn.Parameter(torch.randn(width))
        self.layers = nn.ModuleList(Layer(width) for _ in range(depth))
        self.final = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, width))
        self.head = nn.Linear(width, words, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, tokens: Tensor) -> Tensor:
        """Scores of words."""
        x = self.embed(tokens) + self.start
        for layer in self.layers:
            x = layer(x)
        return self.head(self.final(x))


def tower(dtype: torch.dtype = torch.float32, **sizes: int) -> Tower:
    """A frozen one whose weights are the same each time."""
    generator = torch.Generator().manual_seed(3)
    made = Tower(**sizes)
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) / parameter.shape[-1] ** 0.5)
    return made.to(dtype).eval().requires_grad_(False)
