"""The network: convolutions over a sketch and the tokens of an image, which give hints to the transformer's layers."""

import torch.nn.functional as F
from einops import rearrange
from torch import nn

from diffsynth_sketch.config import TOKEN


class Block(nn.Module):
    """Convolution with a residual connection, and the projection of its output to a hint."""

    def __init__(self, config):
        super().__init__()
        self.norm = nn.GroupNorm(1, config.width)
        self.conv = nn.Conv2d(config.width, config.width, 3, padding=1)
        self.hint = nn.Linear(config.width, config.dim)

    def forward(self, x):
        """Return (features `b c h w`, hint `b s e`)."""
        x = x + self.conv(F.silu(self.norm(x)))
        return x, self.hint(rearrange(x, "b c h w -> b (h w) c"))


class SketchControlNet(nn.Module):
    """A ControlNet for sketches; see `SketchControlNetConfig`."""

    def __init__(self, config):
        super().__init__()
        self.config = config
        self.sketch = nn.Linear(TOKEN**2, config.width)
        self.tokens = nn.Linear(config.dim, config.width)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.depth))

    def forward(self, tokens, sketch):
        """Return a list of hints, tensors `b s e` that are to be added to the tokens of the image, one for each block.

        Args:
            tokens: of the image, row by row, `b s e`.
            sketch: grey image in [-1, 1], `1 1 height width`, of the size of the result.
        """
        pixels = rearrange(sketch, "b 1 (h p) (w q) -> b (h w) (p q)", p=TOKEN, q=TOKEN)
        x = self.sketch(pixels) + self.tokens(tokens)
        x = rearrange(x, "b (h w) c -> b c h w", h=sketch.shape[2] // TOKEN)
        hints = []
        for block in self.blocks:
            x, hint = block(x)
            hints.append(hint)
        return hints
