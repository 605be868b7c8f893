"""A feature for another package's pipeline: adds an argument `mirror` to Z-Image."""

import torch

from diffsynth import Feature, Phase, unit


@unit("latents", random=True, phase=Phase.LATENTS)
def mirror_noise(*, latents: torch.Tensor, mirror: bool = False):
    """With `mirror=True`, mirror the left half of the noise to the right, which makes the image nearly symmetric."""
    if not mirror:
        return latents
    half = latents[..., : (latents.shape[-1] + 1) // 2]
    return torch.cat((half, half.flip(-1)[..., latents.shape[-1] % 2 :]), dim=-1)


MIRROR = Feature("mirror", units=(mirror_noise,))
