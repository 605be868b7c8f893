"""Key rules of the residual autoencoder where a file's names are not our own."""

from __future__ import annotations

from diffsynth.core.loader.convert import Rule
from diffsynth.models.convert import WAN_LATENT_CONVS, wan_ends, wan_resampling, wan_residual_blocks

WAN22_AUTOENCODER_DIFFUSERS: tuple[Rule, ...] = (
    *wan_ends("encoder"),
    *wan_residual_blocks("encoder.down_blocks.{n}.resnets.{m}", "encoder.downsamples.{n}.downsamples.{m}"),
    *wan_resampling("encoder.down_blocks.{n}.downsampler", "encoder.downsamples.{n}.downsamples.2"),
    *WAN_LATENT_CONVS,
    *wan_ends("decoder"),
    *wan_residual_blocks("decoder.up_blocks.{n}.resnets.{m}", "decoder.upsamples.{n}.upsamples.{m}"),
    *wan_resampling("decoder.up_blocks.{n}.upsampler", "decoder.upsamples.{n}.upsamples.3"),
)
"""The `vae/` of Wan2.2-TI2V-5B in diffusers."""
