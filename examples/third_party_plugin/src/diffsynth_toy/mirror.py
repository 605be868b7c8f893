"""A unit for somebody else's pipeline: Z-Image gets an argument `mirror`."""

import torch

from diffsynth import unit


@unit("latents", random=True)
def mirror_noise(*, latents: torch.Tensor, mirror: bool = False):
    """With `mirror=True`, the right half of the noise is the left half seen in a mirror: so is the picture, nearly."""
    if not mirror:
        return latents
    half = latents[..., : (latents.shape[-1] + 1) // 2]
    return torch.cat((half, half.flip(-1)[..., latents.shape[-1] % 2 :]), dim=-1)
