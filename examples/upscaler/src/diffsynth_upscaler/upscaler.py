"""The network: convolutions at the size of the image, and a pixel shuffle (Shi et al. 2016, arXiv:1609.05158)."""

import torch.nn.functional as F
from torch import nn


class Block(nn.Module):
    """Two convolutions with a residual connection."""

    def __init__(self, width):
        super().__init__()
        self.conv1 = nn.Conv2d(width, width, 3, padding=1)
        self.conv2 = nn.Conv2d(width, width, 3, padding=1)

    def forward(self, x):
        """Return the features, `b c h w`."""
        return x + self.conv2(F.relu(self.conv1(x)))


class Upscaler(nn.Module):
    """Network that adds details to an enlarged image; see `UpscalerConfig`."""

    def __init__(self, config):
        super().__init__()
        self.config = config
        self.first = nn.Conv2d(3, config.width, 3, padding=1)
        self.blocks = nn.ModuleList(Block(config.width) for _ in range(config.depth))
        self.last = nn.Conv2d(config.width, 3 * config.factor**2, 3, padding=1)

    def forward(self, image):
        """Return the images in [-1, 1], `b 3 h w`, with height and width times `config.factor`."""
        x = self.first(image)
        for block in self.blocks:
            x = block(x)
        details = F.pixel_shuffle(self.last(x), self.config.factor)
        return F.interpolate(image, scale_factor=self.config.factor, mode="nearest") + details
