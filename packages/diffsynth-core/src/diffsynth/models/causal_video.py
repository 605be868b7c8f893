"""Layers of causal video autoencoders: no frame sees a later one, so a video passes in pieces of any length.

What a layer still needs of earlier frames waits in a `FrameCache`, one for each video that is under way. A video in
one piece and the same video in many give the same numbers, up to the rounding of differently shaped convolutions.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
import torch.nn.functional as F
from einops import rearrange
from jaxtyping import Float
from torch import Tensor, nn

from diffsynth.core.attention import attention


class FrameCache:
    """The frames before the current piece that layers have not done with, by layer.

    `is_first` and `is_last` speak of the current piece; after the last one nothing is kept.
    """

    def __init__(self) -> None:
        self.is_first = True
        self.is_last = False
        self._kept: dict[nn.Module, Tensor] = {}

    def before(
        self, layer: nn.Module, x: Float[Tensor, "b c t h w"], count: int
    ) -> Float[Tensor, "b c t_kept h w"] | None:
        """The last frames that this layer saw, at most `count`, or None if it saw none; then remember those of `x`."""
        kept = self._kept.pop(layer, None)
        if not self.is_last:
            recent = x if kept is None or x.shape[2] >= count else torch.cat((kept, x), dim=2)
            # A copy: a view would keep the whole piece alive.
            self._kept[layer] = recent[:, :, -count:].clone()
        return kept

    def to(self, device: torch.device | str) -> None:
        """Move what is kept."""
        self._kept = {layer: frames.to(device) for layer, frames in self._kept.items()}

    @property
    def nbytes(self) -> int:
        """Bytes of what is kept."""
        return sum(frames.nbytes for frames in self._kept.values())


class CausalLayer(nn.Module):
    """A layer that reads earlier frames: its forward takes a piece and the `FrameCache`."""


class CausalSequential(nn.Sequential, CausalLayer):
    """Layers in a row, some of them causal."""

    def __init__(self, *layers: nn.Module) -> None:
        super().__init__(*layers)
        # Noted now: what takes a layer's place later, to move or quantise it, need not be of its class.
        self._is_causal = tuple(isinstance(layer, CausalLayer) for layer in layers)

    def forward(self, x: Float[Tensor, "b c t h w"], cache: FrameCache) -> Float[Tensor, "b c2 t2 h2 w2"]:
        """See the class."""
        for layer, is_causal in zip(self, self._is_causal, strict=True):
            x = layer(x, cache) if is_causal else layer(x)
        return x


class CausalConv3d(nn.Conv3d, CausalLayer):
    """A convolution that sees the current frame and those before it; before the first frame there are zeros.

    Args:
        kernel: of time, height and width; odd sides. Height and width keep their size.
    """

    def __init__(self, in_dim: int, dim: int, kernel: tuple[int, int, int]) -> None:
        super().__init__(in_dim, dim, kernel, padding=(0, kernel[1] // 2, kernel[2] // 2))

    def forward(self, x: Float[Tensor, "b c t h w"], cache: FrameCache) -> Float[Tensor, "b c2 t h w"]:
        """See the class."""
        depth = self.kernel_size[0] - 1
        if depth == 0:
            return super().forward(x)
        before = cache.before(self, x, depth)
        if before is None and x.shape[2] == 1:
            # A picture, or the first frame: the other taps would meet zeros only.
            picture = F.conv2d(x[:, :, 0], self.weight[:, :, -1], self.bias, padding=self.padding[1:])
            return picture[:, :, None]
        known = [x] if before is None else [before, x]
        missing = depth - (0 if before is None else before.shape[2])
        if missing:
            known.insert(0, x.new_zeros((*x.shape[:2], missing, *x.shape[3:])))
        return super().forward(torch.cat(known, dim=2))


class ChannelNorm(nn.Module):
    """Every pixel's channels to root mean square 1, in fp32, times a learned weight (arXiv:1910.07467).

    Args:
        axes: after the channels: 3 for videos, 2 for pictures.
    """

    def __init__(self, dim: int, axes: int = 3) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.ones(dim, *(1,) * axes))

    def forward(self, x: Float[Tensor, "b c *size"]) -> Float[Tensor, "b c *size"]:
        """See the class."""
        precise = torch.promote_types(x.dtype, torch.float32)
        length = torch.linalg.vector_norm(x, dim=1, keepdim=True, dtype=precise).clamp_min(1e-12)
        return (x / length * (self.gamma * x.shape[1] ** 0.5)).to(x.dtype)


class ResidualBlock(CausalLayer):
    """Two causal convolutions, each after norm and SiLU, around a shortcut."""

    def __init__(self, in_dim: int, dim: int) -> None:
        super().__init__()
        self.residual = CausalSequential(
            ChannelNorm(in_dim),
            nn.SiLU(),
            CausalConv3d(in_dim, dim, (3, 3, 3)),
            ChannelNorm(dim),
            nn.SiLU(),
            nn.Identity(),  # the published names count a dropout here
            CausalConv3d(dim, dim, (3, 3, 3)),
        )
        self.shortcut = nn.Identity() if in_dim == dim else nn.Conv3d(in_dim, dim, 1)

    def forward(self, x: Float[Tensor, "b c t h w"], cache: FrameCache) -> Float[Tensor, "b c2 t h w"]:
        """See the class."""
        return self.shortcut(x) + self.residual(x, cache)


class FrameAttention(nn.Module):
    """One head over the pixels of each frame, with a residual."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.norm = ChannelNorm(dim, axes=2)
        self.to_qkv = nn.Conv2d(dim, 3 * dim, 1)
        self.proj = nn.Conv2d(dim, dim, 1)

    def forward(self, x: Float[Tensor, "b c t h w"]) -> Float[Tensor, "b c t h w"]:
        """See the class."""
        frames = rearrange(x, "b c t h w -> (b t) c h w")
        q, k, v = rearrange(self.to_qkv(self.norm(frames)), "f (three c) h w -> three f (h w) 1 c", three=3)
        attended = rearrange(attention(q, k, v), "f (h w) 1 c -> f c h w", h=x.shape[3])
        return x + rearrange(self.proj(attended), "(b t) c h w -> b c t h w", t=x.shape[2])


class Downsample(CausalLayer):
    """Half the height and width, and half the frames if `in_time`: then the first frame stays alone."""

    def __init__(self, dim: int, *, in_time: bool) -> None:
        super().__init__()
        # Trained with padding on the right and at the bottom only.
        self.resample = nn.Sequential(nn.ZeroPad2d((0, 1, 0, 1)), nn.Conv2d(dim, dim, 3, stride=2))
        self.time_conv = nn.Conv3d(dim, dim, (3, 1, 1), stride=(2, 1, 1)) if in_time else None

    def forward(self, x: Float[Tensor, "b c t h w"], cache: FrameCache) -> Float[Tensor, "b c t2 h2 w2"]:
        """See the class."""
        x = _by_frame(self.resample, x)
        if self.time_conv is None:
            return x
        before = cache.before(self, x, 1)
        if before is not None:
            return self.time_conv(torch.cat((before, x), dim=2))
        first = x[:, :, :1]
        return first if x.shape[2] == 1 else torch.cat((first, self.time_conv(x)), dim=2)


class Upsample(CausalLayer):
    """Twice the height and width, and twice the frames if `in_time`: all but the first frame, which stays alone."""

    def __init__(self, in_dim: int, dim: int, *, in_time: bool) -> None:
        super().__init__()
        self.resample = nn.Sequential(
            nn.Upsample(scale_factor=2.0, mode="nearest"), nn.Conv2d(in_dim, dim, 3, padding=1)
        )
        self.time_conv = CausalConv3d(in_dim, 2 * in_dim, (3, 1, 1)) if in_time else None

    def forward(self, x: Float[Tensor, "b c t h w"], cache: FrameCache) -> Float[Tensor, "b c2 t2 h2 w2"]:
        """See the class."""
        if self.time_conv is not None:
            x = self._twice_the_frames(x, cache)
        return _by_frame(self.resample, x)

    def _twice_the_frames(self, x: Tensor, cache: FrameCache) -> Tensor:
        if not cache.is_first:
            return rearrange(self.time_conv(x, cache), "b (two c) t h w -> b c (t two) h w", two=2)
        # The convolution in time never sees the first frame.
        first, later = x[:, :, :1], x[:, :, 1:]
        if later.shape[2] == 0:
            return first
        doubled = rearrange(self.time_conv(later, cache), "b (two c) t h w -> b c (t two) h w", two=2)
        return torch.cat((first, doubled), dim=2)


class Encoder(nn.Module):
    """Frames to the moments of latents, before `conv1` of the autoencoder mixes them.

    Args:
        in_channels: of the frames.
        moments: channels that come out, mean and log-variance.
        in_dim: width before the first of `blocks`.
        blocks: residual blocks and `Downsample`s, in order.
        dim: width behind the last of `blocks`.
    """

    def __init__(self, in_channels: int, moments: int, *, in_dim: int, blocks: Iterable[nn.Module], dim: int) -> None:
        super().__init__()
        self.conv1 = CausalConv3d(in_channels, in_dim, (3, 3, 3))
        self.downsamples = CausalSequential(*blocks)
        self.middle = _middle(dim)
        self.head = _head(dim, moments)

    def forward(self, x: Float[Tensor, "b c_in t4 h8 w8"], cache: FrameCache) -> Float[Tensor, "b two_c t h w"]:
        """See the class."""
        x = self.downsamples(self.conv1(x, cache), cache)
        return self.head(self.middle(x, cache), cache)


class Decoder(nn.Module):
    """Latents, mixed by `conv2` of the autoencoder, to frames.

    Args:
        latent_channels: of the latents.
        out_channels: of the frames.
        in_dim: width before the first of `blocks`.
        blocks: residual blocks and `Upsample`s, in order.
        dim: width behind the last of `blocks`.
    """

    def __init__(
        self, latent_channels: int, out_channels: int, *, in_dim: int, blocks: Iterable[nn.Module], dim: int
    ) -> None:
        super().__init__()
        self.conv1 = CausalConv3d(latent_channels, in_dim, (3, 3, 3))
        self.middle = _middle(in_dim)
        self.upsamples = CausalSequential(*blocks)
        self.head = _head(dim, out_channels)

    def forward(self, x: Float[Tensor, "b c t h w"], cache: FrameCache) -> Float[Tensor, "b c_in t4 h8 w8"]:
        """See the class."""
        x = self.middle(self.conv1(x, cache), cache)
        return self.head(self.upsamples(x, cache), cache)


def _middle(dim: int) -> CausalSequential:
    return CausalSequential(ResidualBlock(dim, dim), FrameAttention(dim), ResidualBlock(dim, dim))


def _head(dim: int, channels: int) -> CausalSequential:
    return CausalSequential(ChannelNorm(dim), nn.SiLU(), CausalConv3d(dim, channels, (3, 3, 3)))


def _by_frame(layer: nn.Module, x: Float[Tensor, "b c t h w"]) -> Float[Tensor, "b c2 t h2 w2"]:
    frames = layer(rearrange(x, "b c t h w -> (b t) c h w"))
    return rearrange(frames, "(b t) c h w -> b c t h w", t=x.shape[2])
