"""How a face moves, from its picture: the motion encoder of LIA (Wang et al. 2022, arXiv:2203.09043).

Convolutions and linear layers scale their weights when they run (equalised learning rate, Karras et al. 2018,
arXiv:1710.10196). Names are those of the published files.
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


class MotionEncoder(nn.Module):
    """From a face to its motion."""

    def __init__(self, config: WanAnimateConfig) -> None:
        super().__init__()
        self.face_size = config.face_size
        self.enc = PictureEncoder(config)
        self.dec = MotionDecoder(config)

    def forward(self, faces: Float[Tensor, "b 3 height width"]) -> Float[Tensor, "b m"]:
        """The motion of each face.

        Args:
            faces: pixels in [-1, 1], square, of the side that the network was trained on.

        Raises:
            ValueError: another size.
        """
        if faces.shape[2:] != (self.face_size, self.face_size):
            raise ValueError(f"faces are {faces.shape[2]}x{faces.shape[3]}; expected {self.face_size}x{self.face_size}")
        return self.dec(self.enc(faces))


class PictureEncoder(nn.Module):
    """Convolutions down to one place, then linear layers without anything between them."""

    def __init__(self, config: WanAnimateConfig) -> None:
        super().__init__()
        width, depth = config.style_dim, config.style_layers
        self.net_app = Appearance(config)
        self.fc = nn.Sequential(
            *(EqualLinear(width, width) for _ in range(depth - 1)), EqualLinear(width, config.motion_dim)
        )

    def forward(self, faces: Float[Tensor, "b 3 height width"]) -> Float[Tensor, "b d"]:
        """How far each face moved in each direction."""
        return self.fc(self.net_app(faces))


class Appearance(nn.Module):
    """The convolutions; each block halves the picture."""

    def __init__(self, config: WanAnimateConfig) -> None:
        super().__init__()
        channels = config.motion_channels
        self.convs = nn.ModuleList(
            (
                nn.Sequential(EqualConv(3, channels[0], 1), BiasedLeaky(channels[0])),
                *(HalvingBlock(*pair) for pair in itertools.pairwise(channels)),
                EqualConv(channels[-1], config.style_dim, 4),
            )
        )

    def forward(self, faces: Float[Tensor, "b 3 height width"]) -> Float[Tensor, "b style"]:
        """One vector for each face."""
        for conv in self.convs:
            faces = conv(faces)
        return faces.flatten(1)


class HalvingBlock(nn.Module):
    """A residual block to half the size."""

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__()
        self.conv1 = nn.Sequential(EqualConv(in_channels, in_channels, 3, padding=1), BiasedLeaky(in_channels))
        self.conv2 = nn.Sequential(
            Blur(padding=2), EqualConv(in_channels, out_channels, 3, stride=2), BiasedLeaky(out_channels)
        )
        self.skip = nn.Sequential(Blur(padding=1), EqualConv(in_channels, out_channels, 1, stride=2))

    def forward(self, x: Float[Tensor, "b c_in h_in w_in"]) -> Float[Tensor, "b c h w"]:
        """Both ways, of equal weight."""
        return (self.conv2(self.conv1(x)) + self.skip(x)) / math.sqrt(2)


class EqualConv(nn.Module):
    """A convolution without bias whose weights are divided by the square root of their fan-in."""

    def __init__(self, in_channels: int, out_channels: int, size: int, *, stride: int = 1, padding: int = 0) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(out_channels, in_channels, size, size))
        self.scale = 1 / math.sqrt(in_channels * size**2)
        self.stride, self.padding = stride, padding

    def forward(self, x: Float[Tensor, "b c_in h_in w_in"]) -> Float[Tensor, "b c h w"]:
        """As `torch.nn.Conv2d`."""
        return F.conv2d(x, self.weight * self.scale, stride=self.stride, padding=self.padding)


class EqualLinear(nn.Module):
    """A linear layer whose weights are divided by the square root of their fan-in."""

    def __init__(self, in_dim: int, out_dim: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(out_dim, in_dim))
        self.bias = nn.Parameter(torch.zeros(out_dim))
        self.scale = 1 / math.sqrt(in_dim)

    def forward(self, x: Float[Tensor, "b d_in"]) -> Float[Tensor, "b d"]:
        """As `torch.nn.Linear`."""
        return F.linear(x, self.weight * self.scale, self.bias)


class BiasedLeaky(nn.Module):
    """A bias, then a leaky ReLU that keeps the variance."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.bias = nn.Parameter(torch.zeros(1, channels, 1, 1))

    def forward(self, x: Float[Tensor, "b c h w"]) -> Float[Tensor, "b c h w"]:
        """Element by element."""
        return F.leaky_relu(x + self.bias, 0.2) * math.sqrt(2)


class Blur(nn.Module):
    """Each channel smoothed before it is halved. The files hold the kernel, which was never trained."""

    kernel: Tensor

    def __init__(self, *, padding: int) -> None:
        super().__init__()
        self.padding = padding
        self.register_buffer("kernel", blur_kernel())

    def forward(self, x: Float[Tensor, "b c h_in w_in"]) -> Float[Tensor, "b c h w"]:
        """Channel by channel."""
        channels = x.shape[1]
        kernel = self.kernel.to(x.dtype).expand(channels, 1, -1, -1)
        return F.conv2d(x, kernel, padding=self.padding, groups=channels)


def blur_kernel() -> Float[Tensor, "4 4"]:
    """The outer product of `BLUR` with itself, of sum 1."""
    taps = torch.tensor(BLUR)
    return torch.outer(taps, taps) / taps.sum() ** 2


class MotionDecoder(nn.Module):
    """Steps along directions to a motion."""

    def __init__(self, config: WanAnimateConfig) -> None:
        super().__init__()
        self.direction = Directions(config)

    def forward(self, steps: Float[Tensor, "b d"]) -> Float[Tensor, "b m"]:
        """See `Directions`."""
        return self.direction(steps)


class Directions(nn.Module):
    """Directions of motion, made orthogonal when they are used."""

    def __init__(self, config: WanAnimateConfig) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(config.motion_embed_dim, config.motion_dim))

    def forward(self, steps: Float[Tensor, "b d"]) -> Float[Tensor, "b m"]:
        """The sum of all steps; in fp32, because orthogonalising in 16 bits does not give orthogonal directions."""
        orthogonal, _ = torch.linalg.qr(self.weight.float() + 1e-8)
        return (steps.float() @ orthogonal.T).to(steps.dtype)
