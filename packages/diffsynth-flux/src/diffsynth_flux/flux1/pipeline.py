"""FLUX.1 pipeline: images from text and images (Black Forest Labs 2024)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Unpack

import torch
from jaxtyping import Float
from torch import Tensor

from diffsynth.runtime.feature import Condition, StepContext, whole
from diffsynth.runtime.image_units import decode_image
from diffsynth.runtime.pipeline import Pipeline
from diffsynth.runtime.request import LoopArguments, Request
from diffsynth.runtime.role import Agreement, Role, Tokenizer
from diffsynth.terminal import module_logger
from diffsynth_flux.flux1.arguments import OTHER_ARGUMENTS, FluxArguments
from diffsynth_flux.flux1.extension import Extension
from diffsynth_flux.flux1.features import FEATURES
from diffsynth_flux.flux1.features.fill import MASK_CHANNELS
from diffsynth_flux.flux1.units import UNITS

logger = module_logger(__name__)

KONTEXT_MODEL = "flux.1-kontext-dev"
"""Name of the model that is trained with reference images."""


class FluxImagePipeline(Pipeline):
    """Generates images with FLUX.1; the loaded networks determine which arguments a call accepts."""

    roles = {
        "dit": Role(architectures=("flux_dit",)),
        "text_encoder_1": Role(architectures=("clip_text_encoder",)),
        "text_encoder_2": Role(architectures=("t5_text_encoder",)),
        "vae": Role(architectures=("flux_autoencoder",), methods=("encode", "decode")),
        "tokenizer_1": Tokenizer(source="black-forest-labs/FLUX.1-dev:tokenizer/"),
        "tokenizer_2": Tokenizer(source="black-forest-labs/FLUX.1-dev:tokenizer_2/"),
    }
    units = UNITS
    features = FEATURES
    conditions = {
        "prompt_embeds": Condition(whole),
        "pooled_prompt_embeds": Condition(whole),
        "embedded_guidance": Condition(whole),
    }
    output_units = (decode_image,)
    loop = LoopArguments(num_inference_steps=30)
    facts = {"latent_channels": "dit.latent_channels", "embeds_guidance": "dit.guidance_embed"}
    other_arguments = OTHER_ARGUMENTS
    agreements = (
        Agreement("width of CLIP's pooled states", ("text_encoder_1.hidden_size", "dit.pooled_dim")),
        Agreement("width of T5's hidden states", ("text_encoder_2.hidden_size", "dit.context_dim")),
        Agreement("number of latent channels", ("vae.latent_channels", "dit.latent_channels")),
    )
    output_kind = "image"

    def __call__(self, prompt: str | Sequence[str] = "", **arguments: Unpack[FluxArguments]) -> Any:
        """Generate one image, or several; see `Pipeline.__call__`."""
        if arguments.get("kontext_images") is not None and self.model_name not in (None, KONTEXT_MODEL):
            logger.warning(
                "kontext_images is given, and %s was not trained with reference images; %s was",
                self.model_name,
                KONTEXT_MODEL,
            )
        return super().__call__(prompt, **arguments)

    def check(self, **arguments: Any) -> Request:
        """Check a call's arguments without running it; return them, completed with defaults, as a `Request`.

        Errors are those of the call.
        """
        request = super().check(**arguments)
        self._check_network()
        return request

    def velocity(
        self,
        latents: Float[Tensor, "b c h w"],
        sigma: Float[Tensor, "b"],
        *,
        prompt_embeds: Float[Tensor, "b t e_text"],
        pooled_prompt_embeds: Float[Tensor, "b e_pooled"],
        embedded_guidance: float = 3.5,
        fill_latents: Float[Tensor, "#b c_fill h w"] | None = None,
        control_latents: Float[Tensor, "#b c_control h w"] | None = None,
        extensions: tuple[Extension, ...] = (),
        step: StepContext | None = None,
    ) -> Float[Tensor, "b c h w"]:
        """Return the velocity `noise - x0` of the latents, a tensor `b c h w`; see `Pipeline.velocity`.

        Args:
            latents, sigma: see `Pipeline.velocity`.
            prompt_embeds: hidden states of T5.
            pooled_prompt_embeds: pooled hidden state of CLIP.
            embedded_guidance: the guidance input; not used for a network without it.
            fill_latents: latents of an image to fill, and its mask.
            control_latents: latents of a control image.
            extensions: extensions of the transformer; see `diffsynth_flux.flux1.extension`.
            step: the step of the loop; None outside of a loop.
        """
        condition = fill_latents if control_latents is None else control_latents
        if condition is not None:
            condition = condition.expand(len(latents), -1, -1, -1)
        guidance = torch.full_like(sigma, embedded_guidance) if self.dit.config.guidance_embed else None
        text = (prompt_embeds, pooled_prompt_embeds)
        return self.dit(latents, sigma, *text, guidance, condition, extensions=extensions, step=step)

    def _check_network(self) -> None:
        """Raise ValueError for a network with condition channels that no feature makes."""
        config = None if self.dit is None else self.dit.config
        latents = 0 if config is None else config.latent_channels
        if config is None or config.condition_channels in (0, latents, latents + MASK_CHANNELS):
            return
        raise ValueError(
            f"the transformer takes {config.condition_channels} channels beside those of the latents; "
            "this version has no inputs for them. Load FLUX.1-dev, -Fill-dev, -Depth-dev or -Canny-dev"
        )
