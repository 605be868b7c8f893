"""Layers of causal video autoencoders, which process a video in pieces of consecutive frames.

No frame depends on a later one. The earlier frames that a layer needs are stored in a `FrameCache`, one per video. The
result does not depend on the lengths of the pieces, up to the rounding of differently shaped convolutions.
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
    """Last frames of the previous pieces that layers still need, by layer.

    `is_first` and `is_last` refer to the current piece; the last piece stores nothing.
    """

    def __init__(self) -> None:
        self.is_first = True
        self.is_last = False
        self._frames: dict[nn.Module, Tensor] = {}

    def before(
        self, layer: nn.Module, x: Float[Tensor, "b c t h w"], count: int
    ) -> Float[Tensor, "b c t_before h w"] | None:
        """Return the stored last frames of a layer's earlier pieces, or None if there are none, and store the last
        `count` frames up to the end of `x` (none after the last piece).
        """
        before = self._frames.pop(layer, None)
        if not self.is_last:
            recent = x if before is None or x.shape[2] >= count else torch.cat((before, x), dim=2)
            # A view would hold the memory of the whole piece.
            self._frames[layer] = recent[:, :, -count:].clone()
        return before

    def to(self, device: torch.device | str) -> None:
        """Move all stored frames of this cache to `device`, in place."""
        self._frames = {layer: frames.to(device) for layer, frames in self._frames.items()}

    @property
    def nbytes(self) -> int:
        """Memory of all stored frames, in bytes."""
        return sum(frames.nbytes for frames in self._frames.values())


class CausalLayer(nn.Module):
    """Base class of layers that need earlier frames: forward() takes a piece and the `FrameCache`."""


class CausalSequential(nn.Sequential, CausalLayer):
    """Sequence of layers; the causal ones also get the `FrameCache`."""

    def __init__(self, *layers: nn.Module) -> None:
        super().__init__(*layers)
        # Recorded at construction: a wrapper that replaces a layer (offloading, quantization) may have another class.
        self._is_causal = tuple(isinstance(layer, CausalLayer) for layer in layers)

    def forward(self, x: Float[Tensor, "b c t h w"], cache: FrameCache) -> Float[Tensor, "b c2 t2 h2 w2"]:
        """Return the features `b c2 t2 h2 w2` of a piece of a video (`x`) after all layers in order."""
        for layer, is_causal in zip(self, self._is_causal, strict=True):
            x = layer(x, cache) if is_causal else layer(x)
        return x


class CausalConv3d(nn.Conv3d, CausalLayer):
    """3D convolution over a frame and earlier frames, with zeros before the first frame.

    Args:
        kernel: size along time, height and width; the latter two are odd. Height and width of the video stay the same.
    """

    def __init__(self, in_dim: int, dim: int, kernel: tuple[int, int, int]) -> None:
        super().__init__(in_dim, dim, kernel, padding=(0, kernel[1] // 2, kernel[2] // 2))

    def forward(self, x: Float[Tensor, "b c t h w"], cache: FrameCache) -> Float[Tensor, "b c2 t h w"]:
        """Return the convolved features `b c2 t h w` of a piece of a video, with as many frames as `x`; earlier frames
        come from `cache`.
        """
        depth = self.kernel_size[0] - 1
        if depth == 0:
            return super().forward(x)
        before = cache.before(self, x, depth)
        if before is None and x.shape[2] == 1:
            # For an image, or the first frame, the other time steps of the kernel would only meet zeros.
            image = F.conv2d(x[:, :, 0], self.weight[:, :, -1], self.bias, padding=self.padding[1:])
            return image[:, :, None]
        known = [x] if before is None else [before, x]
        missing = depth - (0 if before is None else before.shape[2])
        if missing:
            known.insert(0, x.new_zeros((*x.shape[:2], missing, *x.shape[3:])))
        return super().forward(torch.cat(known, dim=2))


class ChannelNorm(nn.Module):
    """RMS norm over the channels of each pixel, computed in fp32, with a learned weight (arXiv:1910.07467).

    Args:
        axes: number of axes after the channels: 3 for videos, 2 for images.
    """

    def __init__(self, dim: int, axes: int = 3) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.ones(dim, *(1,) * axes))

    def forward(self, x: Float[Tensor, "b c *size"]) -> Float[Tensor, "b c *size"]:
        """Return `x` normalised over its channels and scaled by the weight, in the dtype of `x`."""
        precise = torch.promote_types(x.dtype, torch.float32)
        length = torch.linalg.vector_norm(x, dim=1, keepdim=True, dtype=precise).clamp_min(1e-12)
        return (x / length * (self.gamma * x.shape[1] ** 0.5)).to(x.dtype)


class ResidualBlock(CausalLayer):
    """Residual block of two causal convolutions, each after norm and SiLU."""

    def __init__(self, in_dim: int, dim: int) -> None:
        super().__init__()
        self.residual = CausalSequential(
            ChannelNorm(in_dim),
            nn.SiLU(),
            CausalConv3d(in_dim, dim, (3, 3, 3)),
            ChannelNorm(dim),
            nn.SiLU(),
            nn.Identity(),  # a dropout in the published code, which takes an index in the parameter names
            CausalConv3d(dim, dim, (3, 3, 3)),
        )
        self.shortcut = nn.Identity() if in_dim == dim else nn.Conv3d(in_dim, dim, 1)

    def forward(self, x: Float[Tensor, "b c t h w"], cache: FrameCache) -> Float[Tensor, "b c2 t h w"]:
        """Return the features `b c2 t h w` of a piece of a video after this residual block."""
        return self.shortcut(x) + self.residual(x, cache)


class FrameAttention(nn.Module):
    """Single-head self-attention over the pixels of each frame, with a residual connection."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.norm = ChannelNorm(dim, axes=2)
        self.to_qkv = nn.Conv2d(dim, 3 * dim, 1)
        self.proj = nn.Conv2d(dim, dim, 1)

    def forward(self, x: Float[Tensor, "b c t h w"]) -> Float[Tensor, "b c t h w"]:
        """Return the tensor `x` plus the self-attention output within each frame, in the shape of `x`."""
        frames = rearrange(x, "b c t h w -> (b t) c h w")
        q, k, v = rearrange(self.to_qkv(self.norm(frames)), "f (three c) h w -> three f (h w) 1 c", three=3)
        attended = rearrange(attention(q, k, v), "f (h w) 1 c -> f c h w", h=x.shape[3])
        return x + rearrange(self.proj(attended), "(b t) c h w -> b c t h w", t=x.shape[2])


class Downsample(CausalLayer):
    """Downsampling that halves height and width and, if `in_time`, the frames after the first one."""

    def __init__(self, dim: int, *, in_time: bool) -> None:
        super().__init__()
        # The network was trained with padding on the right and at the bottom only.
        self.resample = nn.Sequential(nn.ZeroPad2d((0, 1, 0, 1)), nn.Conv2d(dim, dim, 3, stride=2))
        self.time_conv = nn.Conv3d(dim, dim, (3, 1, 1), stride=(2, 1, 1)) if in_time else None

    def forward(self, x: Float[Tensor, "b c t h w"], cache: FrameCache) -> Float[Tensor, "b c t2 h2 w2"]:
        """Return the features `b c t2 h2 w2` of a piece of a video at half the height and width; with `in_time`, two
        frames become one, except that a video's first stays.
        """
        x = _by_frame(self.resample, x)
        if self.time_conv is None:
            return x
        before = cache.before(self, x, 1)
        if before is not None:
            return self.time_conv(torch.cat((before, x), dim=2))
        first = x[:, :, :1]
        return first if x.shape[2] == 1 else torch.cat((first, self.time_conv(x)), dim=2)


class Upsample(CausalLayer):
    """Upsampling that doubles height and width and, if `in_time`, the frames after the first one."""

    def __init__(self, in_dim: int, dim: int, *, in_time: bool) -> None:
        super().__init__()
        self.resample = nn.Sequential(
            nn.Upsample(scale_factor=2.0, mode="nearest"), nn.Conv2d(in_dim, dim, 3, padding=1)
        )
        self.time_conv = CausalConv3d(in_dim, 2 * in_dim, (3, 1, 1)) if in_time else None

    def forward(self, x: Float[Tensor, "b c t h w"], cache: FrameCache) -> Float[Tensor, "b c2 t2 h2 w2"]:
        """Return the features `b c2 t2 h2 w2` of a piece of a video at twice the height and width; with `in_time`, each
        frame becomes two, except the video's first.
        """
        if self.time_conv is not None:
            x = self._double_frames(x, cache)
        return _by_frame(self.resample, x)

    def _double_frames(self, x: Tensor, cache: FrameCache) -> Tensor:
        if not cache.is_first:
            return rearrange(self.time_conv(x, cache), "b (two c) t h w -> b c (t two) h w", two=2)
        # The published network does not apply the convolution along time to the first frame.
        first, later = x[:, :, :1], x[:, :, 1:]
        if later.shape[2] == 0:
            return first
        doubled = rearrange(self.time_conv(later, cache), "b (two c) t h w -> b c (t two) h w", two=2)
        return torch.cat((first, doubled), dim=2)


class Encoder(nn.Module):
    """Encoder from frames to mean and log-variance of the latents, before `conv1` of the autoencoder.

    Args:
        in_channels: channels of the frames.
        moments: output channels, for mean and log-variance together.
        in_dim: channels before the first of `blocks`.
        blocks: residual blocks and `Downsample` layers, in order.
        dim: channels after the last of `blocks`.
    """

    def __init__(self, in_channels: int, moments: int, *, in_dim: int, blocks: Iterable[nn.Module], dim: int) -> None:
        super().__init__()
        self.conv1 = CausalConv3d(in_channels, in_dim, (3, 3, 3))
        self.downsamples = CausalSequential(*blocks)
        self.middle = _middle(dim)
        self.head = _head(dim, moments)

    def forward(self, x: Float[Tensor, "b c_in t4 h8 w8"], cache: FrameCache) -> Float[Tensor, "b two_c t h w"]:
        """Return one tensor `b two_c t h w` for a piece of a video: the features that the autoencoder's `conv1` maps to
        mean and log-variance of the latents.
        """
        x = self.downsamples(self.conv1(x, cache), cache)
        return self.head(self.middle(x, cache), cache)


class Decoder(nn.Module):
    """Decoder from latents, after `conv2` of the autoencoder, to frames.

    Args:
        latent_channels: channels of the latents.
        out_channels: channels of the frames.
        in_dim: channels before the first of `blocks`.
        blocks: residual blocks and `Upsample` layers, in order.
        dim: channels after the last of `blocks`.
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
        """Return the decoded frames of a piece of latents (after the autoencoder's `conv2`) as a tensor `b c_in t4 h8
        w8`.
        """
        x = self.middle(self.conv1(x, cache), cache)
        return self.head(self.upsamples(x, cache), cache)


def _middle(dim: int) -> CausalSequential:
    return CausalSequential(ResidualBlock(dim, dim), FrameAttention(dim), ResidualBlock(dim, dim))


def _head(dim: int, channels: int) -> CausalSequential:
    return CausalSequential(ChannelNorm(dim), nn.SiLU(), CausalConv3d(dim, channels, (3, 3, 3)))


def _by_frame(layer: nn.Module, x: Float[Tensor, "b c t h w"]) -> Float[Tensor, "b c2 t h2 w2"]:
    frames = layer(rearrange(x, "b c t h w -> (b t) c h w"))
    return rearrange(frames, "(b t) c h w -> b c t h w", t=x.shape[2])
