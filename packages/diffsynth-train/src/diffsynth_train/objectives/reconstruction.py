"""Training objective of a variational autoencoder: reconstruction of images, with latents of unit variance."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from jaxtyping import Float
from torch import Tensor

from diffsynth.errors import TrainingError
from diffsynth.runtime.pipeline import Pipeline
from diffsynth.runtime.unit import Unit
from diffsynth.spec import TrainingSpec


@dataclass(frozen=True, kw_only=True)
class ReconstructionOptions:
    """Options of the objective `reconstruction` in a recipe.

    Args:
        role: role of the autoencoder; it has `encode_moments`, `decode`, and a config with scaling and shift factors.
        image: call argument that holds the images.
        crop: side in pixels of a random square crop of every image; 0 uses whole images.
        l1_weight: weight of the absolute error, added to the squared error.
        kl_weight: weight of the KL divergence from a standard normal, per latent value (Kingma & Welling 2014,
            arXiv:1312.6114).
        sample: decode a sample of the posterior; false decodes its mean.
        noise: standard deviation of noise added to the latents before decoding, in units of the latents' standard
            deviation; it makes the decoder robust to errors of a denoiser.
    """

    role: str = "vae"
    image: str = "input_image"
    crop: int = 0
    l1_weight: float = 0.0
    kl_weight: float = 1e-6
    sample: bool = True
    noise: float = 0.0


class Reconstruction:
    """Weighted sum of squared error, absolute error and KL divergence; `finish()` normalises the latents."""

    Options: ClassVar[type] = ReconstructionOptions
    needs_forward_only: ClassVar[bool] = False

    def __init__(self, options: ReconstructionOptions, pipe: Pipeline, spec: TrainingSpec) -> None:
        self.options = options
        self.pipe = pipe
        self.columns = frozenset({options.image})
        self.autoencoder = pipe.components.get(options.role)
        if self.autoencoder is None:
            raise TrainingError(f"[objective] role = {options.role!r}: no such component in the recipe")
        if options.crop % self.autoencoder.config.factor:
            factor = self.autoencoder.config.factor
            raise TrainingError(f"[objective] crop = {options.crop}: expected a multiple of {factor}")

    def units(self) -> tuple[Unit, ...]:
        """Return an empty tuple of units: the loss calls the autoencoder directly and needs no results of units."""
        return ()

    def loss(self, values: Mapping[str, Any], generator: torch.Generator) -> tuple[Tensor, dict[str, Tensor]]:
        """Return (loss, metrics): a scalar tensor with gradient, and a dict with `mse`, the mean squared error without
        the other terms.
        """
        options, config = self.options, self.autoencoder.config
        image: Float[Tensor, "b c h w"] = self._crop(values[options.image], generator)
        mean, logvar = self.autoencoder.encode_moments(image)
        mean, logvar = mean.float(), logvar.float()
        z = mean
        if options.sample:
            z = z + (0.5 * logvar).exp() * _noise_like(mean, generator)
        if options.noise:
            z = z + options.noise * mean.detach().std() * _noise_like(mean, generator)
        decoded = self.autoencoder.decode((z - config.shift_factor) * config.scaling_factor).float()
        squared = (decoded - image).square().mean()
        divergence = 0.5 * (mean.square() + logvar.exp() - 1 - logvar).mean()
        loss = squared + options.l1_weight * (decoded - image).abs().mean() + options.kl_weight * divergence
        return loss, {"mse": squared.detach()}

    @torch.no_grad()
    def finish(self, batches: Iterable[Mapping[str, Any]]) -> None:
        """Set shift and scaling factor in the autoencoder's config so that scaled latents of all rows have mean 0 and
        variance 1.
        """
        means = [self.autoencoder.encode_moments(values[self.options.image])[0].float() for values in batches]
        z = torch.cat([mean.flatten() for mean in means]).double()
        self.autoencoder.config = dataclasses.replace(
            self.autoencoder.config, shift_factor=z.mean().item(), scaling_factor=1 / z.std().item()
        )

    def _crop(self, image: Float[Tensor, "b c h w"], generator: torch.Generator) -> Float[Tensor, "b c side side"]:
        side = self.options.crop
        if not side:
            return image
        height, width = image.shape[-2:]
        if side > min(height, width):
            raise TrainingError(f"[objective] crop = {side}: larger than the images, {height}x{width}")
        offsets = torch.rand(2, len(image), generator=generator, device=image.device)
        tops = (offsets[0] * (height - side + 1)).long().tolist()
        lefts = (offsets[1] * (width - side + 1)).long().tolist()
        corners = zip(image, tops, lefts, strict=True)
        return torch.stack([each[:, top : top + side, left : left + side] for each, top, left in corners])


def _noise_like(tensor: Tensor, generator: torch.Generator) -> Tensor:
    return torch.randn(tensor.shape, generator=generator, device=tensor.device)
