"""The network: diffusers' own class, built from our config."""

from diffusers import UNet2DModel
from torch import nn

from diffsynth_unet.config import GROUPS, HEAD_DIM


class UNet(nn.Module):
    """An unconditional `UNet2DModel`; see `UNetConfig`."""

    def __init__(self, config):
        super().__init__()
        self.config = config
        kinds = ["Attn" if attention else "" for attention in config.attention]
        self.unet = UNet2DModel(
            in_channels=config.channels,
            out_channels=config.channels,
            block_out_channels=config.widths,
            layers_per_block=config.layers,
            down_block_types=tuple(f"{kind}DownBlock2D" for kind in kinds),
            up_block_types=tuple(f"{kind}UpBlock2D" for kind in reversed(kinds)),
            norm_num_groups=GROUPS,
            attention_head_dim=HEAD_DIM,
        )

    def forward(self, pixels, timestep):
        """Return the prediction, `b c h w`.

        Args:
            pixels: noisy image of variance 1, `b c h w`, height and width multiples of 8.
            timestep: training timestep in [0, 999], `b`, fp32.
        """
        return self.unet(pixels, timestep, return_dict=False)[0]
