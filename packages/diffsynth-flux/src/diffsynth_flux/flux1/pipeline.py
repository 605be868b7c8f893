"""FLUX.1 pipeline: text to image and image to image (Black Forest Labs 2024)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Unpack

import torch
from jaxtyping import Float
from torch import Tensor

from diffsynth.runtime.feature import Condition, StepContext, whole
from diffsynth.runtime.image_units import decode_image
from diffsynth.runtime.pipeline import Pipeline
from diffsynth.runtime.request import LoopArguments, Request
from diffsynth.runtime.role import Agreement, Role, Tokenizer
from diffsynth_flux.flux1.arguments import FluxArguments
from diffsynth_flux.flux1.extension import Extension
from diffsynth_flux.flux1.features import FEATURES
from diffsynth_flux.flux1.units import MAX_T5_TOKENS, UNITS, set_guidance


class FluxImagePipeline(Pipeline):
    """Generates images with FLUX.1-dev, -schnell and -Krea-dev, which differ in weights and configs only."""

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
    facts = {"latent_channels": "dit.latent_channels"}
    agreements = (
        Agreement("width of CLIP's pooled states", ("text_encoder_1.hidden_size", "dit.pooled_dim")),
        Agreement("width of T5's hidden states", ("text_encoder_2.hidden_size", "dit.context_dim")),
        Agreement("number of latent channels", ("vae.latent_channels", "dit.latent_channels")),
    )
    output_kind = "image"

    def __call__(self, prompt: str | Sequence[str] = "", **arguments: Unpack[FluxArguments]) -> Any:
        """Generate one image, or several; see `Pipeline.__call__`."""
        return super().__call__(prompt, **arguments)

    def check(self, **arguments: Any) -> Request:
        """Check a call's arguments without running it; return them, completed with defaults, as a `Request`.

        Errors are those of the call.
        """
        request = super().check(**arguments)
        self._check_guidance(request.values)
        length = request.values["t5_sequence_length"]
        if isinstance(length, bool) or not isinstance(length, int) or not 1 <= length <= MAX_T5_TOKENS:
            raise ValueError(f"t5_sequence_length={length!r}: expected an integer from 1 to {MAX_T5_TOKENS}")
        return request

    def velocity(
        self,
        latents: Float[Tensor, "b c h w"],
        sigma: Float[Tensor, "b"],
        *,
        prompt_embeds: Float[Tensor, "b t e_text"],
        pooled_prompt_embeds: Float[Tensor, "b e_pooled"],
        embedded_guidance: float = 3.5,
        extensions: tuple[Extension, ...] = (),
        step: StepContext | None = None,
    ) -> Float[Tensor, "b c h w"]:
        """Return the velocity `noise - x0` of the latents, a tensor `b c h w`; see `Pipeline.velocity`."""
        guidance = torch.full_like(sigma, embedded_guidance) if self.dit.config.guidance_embed else None
        return self.dit(latents, sigma, prompt_embeds, pooled_prompt_embeds, guidance, extensions=extensions, step=step)

    def _check_guidance(self, values: Mapping[str, Any]) -> None:
        guidance = set_guidance(embedded_guidance=values["embedded_guidance"])
        default = self.__signature__.parameters["embedded_guidance"].default
        if self.dit is not None and not self.dit.config.guidance_embed and guidance != default:
            raise ValueError(
                f"embedded_guidance={guidance} is given, but this network takes no guidance, as FLUX.1-schnell; leave "
                "it out"
            )
