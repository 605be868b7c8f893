"""Motion encoder of LIA (Wang et al. 2022, arXiv:2203.09043): from the image of a face to a motion vector.

Convolutions and linear layers scale their weights in forward() (equalised learning rate, Karras et al. 2018,
arXiv:1710.10196). Parameter names are those of the published files.
"""

from __future__ import annotations

import itertools
import math

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from diffsynth_wan.config import WanAnimateConfig

BLUR = (1.0, 3.0, 3.0, 1.0)
"""Weights of the one-dimensional blur filter, before normalisation."""


class MotionEncoder(nn.Module):
    """Encoder of face images to motion vectors: coefficients of learned directions, then their sum."""

    def __init__(self, config: WanAnimateConfig) -> None:
        super().__init__()
        self.face_size = config.face_size
        self.enc = CoefficientEncoder(config)
        self.dec = MotionDecoder(config)

    def forward(self, faces: Float[Tensor, "b 3 height width"]) -> Float[Tensor, "b m"]:
        """Return the motion vectors `b m`, one for each image of a face.

        Args:
            faces: square images in [-1, 1] with a side of `config.face_size` pixels, as in training.

        Raises:
            ValueError: the images have another size.
        """
        if faces.shape[2:] != (self.face_size, self.face_size):
            raise ValueError(f"faces are {faces.shape[2]}x{faces.shape[3]}; expected {self.face_size}x{self.face_size}")
        return self.dec(self.enc(faces))


class CoefficientEncoder(nn.Module):
    """Convolutions down to one pixel, then linear layers without activations between them."""

    def __init__(self, config: WanAnimateConfig) -> None:
        super().__init__()
        width, depth = config.style_dim, config.style_layers
        self.net_app = AppearanceEncoder(config)
        self.fc = nn.Sequential(
            *(EqualLinear(width, width) for _ in range(depth - 1)), EqualLinear(width, config.motion_dim)
        )

    def forward(self, faces: Float[Tensor, "b 3 height width"]) -> Float[Tensor, "b d"]:
        """Return coefficients `b d`: for each image of a face, one of each motion direction."""
        return self.fc(self.net_app(faces))


class AppearanceEncoder(nn.Module):
    """Convolutional network; each block halves height and width."""

    def __init__(self, config: WanAnimateConfig) -> None:
        super().__init__()
        channels = config.motion_channels
        self.convs = nn.ModuleList(
            (
                nn.Sequential(EqualConv(3, channels[0], 1), BiasedLeakyReLU(channels[0])),
                *(DownsampleBlock(*pair) for pair in itertools.pairwise(channels)),
                EqualConv(channels[-1], config.style_dim, 4),
            )
        )

    def forward(self, faces: Float[Tensor, "b 3 height width"]) -> Float[Tensor, "b style"]:
        """Return feature vectors `b style`, one for each image of a face."""
        for conv in self.convs:
            faces = conv(faces)
        return faces.flatten(1)


class DownsampleBlock(nn.Module):
    """Residual block that halves height and width."""

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__()
        self.conv1 = nn.Sequential(EqualConv(in_channels, in_channels, 3, padding=1), BiasedLeakyReLU(in_channels))
        self.conv2 = nn.Sequential(
            Blur(padding=2), EqualConv(in_channels, out_channels, 3, stride=2), BiasedLeakyReLU(out_channels)
        )
        self.skip = nn.Sequential(Blur(padding=1), EqualConv(in_channels, out_channels, 1, stride=2))

    def forward(self, x: Float[Tensor, "b c_in h_in w_in"]) -> Float[Tensor, "b c h w"]:
        """Return feature maps `b c h w` of half the size: convolutions plus skip connection, divided by sqrt(2)."""
        return (self.conv2(self.conv1(x)) + self.skip(x)) / math.sqrt(2)


class EqualConv(nn.Module):
    """2D convolution without bias whose weights are divided by the square root of their fan-in."""

    def __init__(self, in_channels: int, out_channels: int, size: int, *, stride: int = 1, padding: int = 0) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(out_channels, in_channels, size, size))
        self.scale = 1 / math.sqrt(in_channels * size**2)
        self.stride, self.padding = stride, padding

    def forward(self, x: Float[Tensor, "b c_in h_in w_in"]) -> Float[Tensor, "b c h w"]:
        """Return feature maps `b c h w`: the convolution of `x`, without bias, by weights divided by the square root of
        their fan-in.
        """
        return F.conv2d(x, self.weight * self.scale, stride=self.stride, padding=self.padding)


class EqualLinear(nn.Module):
    """Linear layer whose weights are divided by the square root of their fan-in."""

    def __init__(self, in_dim: int, out_dim: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(out_dim, in_dim))
        self.bias = nn.Parameter(torch.zeros(out_dim))
        self.scale = 1 / math.sqrt(in_dim)

    def forward(self, x: Float[Tensor, "b d_in"]) -> Float[Tensor, "b d"]:
        """Return vectors `b d`: the linear map of `x` by weights divided by the square root of their fan-in, plus a
        bias.
        """
        return F.linear(x, self.weight * self.scale, self.bias)


class BiasedLeakyReLU(nn.Module):
    """Bias and leaky ReLU, scaled to preserve the variance."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.bias = nn.Parameter(torch.zeros(1, channels, 1, 1))

    def forward(self, x: Float[Tensor, "b c h w"]) -> Float[Tensor, "b c h w"]:
        """Return a tensor `b c h w`: the leaky ReLU (slope 0.2) of `x` plus a bias per channel, times sqrt(2)."""
        return F.leaky_relu(x + self.bias, 0.2) * math.sqrt(2)


class Blur(nn.Module):
    """Low-pass filter of each channel before downsampling. Files hold the constant kernel as a buffer."""

    kernel: Tensor

    def __init__(self, *, padding: int) -> None:
        super().__init__()
        self.padding = padding
        self.register_buffer("kernel", blur_kernel())

    def forward(self, x: Float[Tensor, "b c h_in w_in"]) -> Float[Tensor, "b c h w"]:
        """Return feature maps `b c h w`: each channel of `x` convolved with the 4 x 4 blur kernel; sides grow by twice
        the padding minus 3.
        """
        channels = x.shape[1]
        kernel = self.kernel.to(x.dtype).expand(channels, 1, -1, -1)
        return F.conv2d(x, kernel, padding=self.padding, groups=channels)


def blur_kernel() -> Float[Tensor, "4 4"]:
    """Return the blur kernel, a tensor `4 4`: the outer product of `BLUR` with itself, normalised to a sum of 1."""
    taps = torch.tensor(BLUR)
    return torch.outer(taps, taps) / taps.sum() ** 2


class MotionDecoder(nn.Module):
    """Linear combination of motion directions."""

    def __init__(self, config: WanAnimateConfig) -> None:
        super().__init__()
        self.direction = MotionDirections(config)

    def forward(self, coefficients: Float[Tensor, "b d"]) -> Float[Tensor, "b m"]:
        """Return the motion vectors `b m` that the coefficients give; see `MotionDirections`."""
        return self.direction(coefficients)


class MotionDirections(nn.Module):
    """Learned directions of motion, orthogonalised in forward()."""

    def __init__(self, config: WanAnimateConfig) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(config.motion_embed_dim, config.motion_dim))

    def forward(self, coefficients: Float[Tensor, "b d"]) -> Float[Tensor, "b m"]:
        """Return the motion vectors `b m`: the sum of the orthogonal directions times `coefficients`.

        Computed in fp32: QR in 16 bits does not give orthogonal directions.
        """
        orthogonal, _ = torch.linalg.qr(self.weight.float() + 1e-8)
        return (coefficients.float() @ orthogonal.T).to(coefficients.dtype)
