"""The network: predicts the noise in a noisy image of a class (Ho et al. 2020, arXiv:2006.11239)."""

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import nn

from diffsynth.core.attention import attention
from diffsynth.nn.timestep import TimestepEmbedder
from diffsynth_pixelddpm.config import GROUPS, HEAD_DIM


class ResidualBlock(nn.Module):
    """Two convolutions with a residual connection; time and class are added between them."""

    def __init__(self, channels, width):
        super().__init__()
        self.first = nn.Sequential(nn.GroupNorm(GROUPS, channels), nn.SiLU(), nn.Conv2d(channels, width, 3, padding=1))
        self.condition = nn.Linear(width, width)
        self.second = nn.Sequential(nn.GroupNorm(GROUPS, width), nn.SiLU(), nn.Conv2d(width, width, 3, padding=1))
        self.shortcut = nn.Identity() if channels == width else nn.Conv2d(channels, width, 1)

    def forward(self, x, condition):
        """Return the hidden states, `b c h w`."""
        hidden = self.first(x) + self.condition(condition)[:, :, None, None]
        return self.shortcut(x) + self.second(hidden)


class SelfAttention(nn.Module):
    """Self-attention of all pixels of the lowest resolution, with a residual connection."""

    def __init__(self, width):
        super().__init__()
        self.norm = nn.GroupNorm(GROUPS, width)
        self.qkv = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)

    def forward(self, x):
        """Return the hidden states, `b c h w`."""
        tokens = self.qkv(rearrange(self.norm(x), "b c h w -> b (h w) c"))
        q, k, v = rearrange(tokens, "b s (three n d) -> three b s n d", three=3, d=HEAD_DIM)
        out = self.out(rearrange(attention(q, k, v), "b s n d -> b s (n d)"))
        return x + rearrange(out, "b (h w) c -> b c h w", h=x.shape[2])


class PixelUNet(nn.Module):
    """A UNet over pixels; see `PixelUNetConfig`."""

    def __init__(self, config):
        super().__init__()
        self.config = config
        width = config.width
        self.time = TimestepEmbedder(width, hidden_dim=4 * width, frequency_dim=width)
        self.labels = nn.Embedding(config.num_classes + 1, width)
        self.first = nn.Conv2d(3, width, 3, padding=1)
        self.down = nn.ModuleList(ResidualBlock(width, width) for _ in range(2))
        self.middle = ResidualBlock(width, width)
        self.attention = SelfAttention(width)
        self.up = nn.ModuleList(ResidualBlock(2 * width, width) for _ in range(2))
        self.last = nn.Sequential(nn.GroupNorm(GROUPS, width), nn.SiLU(), nn.Conv2d(width, 3, 3, padding=1))

    def forward(self, pixels, timestep, labels):
        """Predict the noise, `b 3 h w`.

        Args:
            pixels: noisy image of variance 1, `b 3 h w`, height and width multiples of 4.
            timestep: training timestep in [0, 999], `b`, fp32.
            labels: classes, `b`; the last is the null class.
        """
        condition = F.silu(self.time(timestep, dtype=pixels.dtype) + self.labels(labels))
        x, skips = self.first(pixels), []
        for block in self.down:
            x = block(x, condition)
            skips.append(x)
            x = F.avg_pool2d(x, 2)
        x = self.attention(self.middle(x, condition))
        for block in self.up:
            x = torch.cat((F.interpolate(x, scale_factor=2), skips.pop()), dim=1)
            x = block(x, condition)
        return self.last(x)
