"""The network: predicts the velocity `noise - sound` of a noisy waveform."""

from einops import rearrange
from torch import nn

from diffsynth.core.attention import attention
from diffsynth.nn.timestep import TimestepEmbedder
from diffsynth_sound.config import HEAD_DIM, PATCH


class Block(nn.Module):
    """A convolution over time, self-attention and a feed-forward, each with a residual connection."""

    def __init__(self, width):
        super().__init__()
        self.conv = nn.Conv1d(width, width, 5, padding=2)
        self.attention_norm = nn.LayerNorm(width)
        self.qkv = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)
        self.feed_forward = nn.Sequential(
            nn.LayerNorm(width), nn.Linear(width, 2 * width), nn.SiLU(), nn.Linear(2 * width, width)
        )

    def forward(self, x):
        """Return the hidden states, `b s e`."""
        x = x + rearrange(self.conv(rearrange(x, "b s e -> b e s")), "b e s -> b s e")
        q, k, v = rearrange(self.qkv(self.attention_norm(x)), "b s (three n d) -> three b s n d", three=3, d=HEAD_DIM)
        x = x + self.out(rearrange(attention(q, k, v), "b s n d -> b s (n d)"))
        return x + self.feed_forward(x)


class SoundNet(nn.Module):
    """A transformer over patches of a waveform; see `SoundNetConfig`."""

    def __init__(self, config):
        super().__init__()
        self.config = config
        width = config.width
        self.first = nn.Conv1d(config.channels, width, PATCH, stride=PATCH)
        self.time = TimestepEmbedder(width, hidden_dim=width, frequency_dim=width)
        self.frequency = TimestepEmbedder(width, hidden_dim=width, frequency_dim=width)
        self.blocks = nn.ModuleList(Block(width) for _ in range(config.depth))
        self.last = nn.ConvTranspose1d(width, config.channels, PATCH, stride=PATCH)

    def forward(self, samples, sigma, frequencies):
        """Predict the velocity, `b c n`.

        Args:
            samples: noisy waveform, `b c n`, n a multiple of 16.
            sigma: noise level in [0, 1], `b`, fp32.
            frequencies: pitch in Hz, `b`, fp32.
        """
        x = rearrange(self.first(samples), "b e s -> b s e")
        x = x + (self.time(10 * sigma, dtype=x.dtype) + self.frequency(frequencies, dtype=x.dtype))[:, None]
        for block in self.blocks:
            x = block(x)
        return self.last(rearrange(x, "b s e -> b e s"))
