"""FLUX.2 pipeline: text to image, image to image, and editing of reference images (Black Forest Labs 2025)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Unpack

from jaxtyping import Float
from torch import Tensor

from diffsynth.runtime.branch_lora import parse_branch_lora
from diffsynth.runtime.feature import Condition, StepContext
from diffsynth.runtime.image_units import decode_image
from diffsynth.runtime.pipeline import Pipeline
from diffsynth.runtime.request import LoopArguments, Request
from diffsynth.runtime.role import Agreement, Role, Tokenizer
from diffsynth_flux.flux2.arguments import OTHER_ARGUMENTS, Flux2Arguments
from diffsynth_flux.flux2.extension import Extension
from diffsynth_flux.flux2.features import FEATURES
from diffsynth_flux.flux2.units import UNITS

_NO_FRAMES = "an image has no frames"


class Flux2ImagePipeline(Pipeline):
    """Generates images with FLUX.2-dev and FLUX.2-klein, which differ in weights, configs and text encoder."""

    roles = {
        "dit": Role(architectures=("flux2_dit",)),
        "text_encoder": Role(architectures=("mistral_text_encoder", "qwen3_text_encoder")),
        "vae": Role(architectures=("flux2_autoencoder",), methods=("encode", "decode")),
        "tokenizer": Tokenizer(source="black-forest-labs/FLUX.2-dev:tokenizer/"),
    }
    units = UNITS
    features = FEATURES
    conditions = {"prompt_embeds": Condition(_NO_FRAMES), "network_guidance": Condition(_NO_FRAMES)}
    output_units = (decode_image,)
    loop = LoopArguments(num_inference_steps=30)
    facts = {"latent_channels": "dit.in_channels", "embeds_guidance": "dit.embeds_guidance"}
    other_arguments = OTHER_ARGUMENTS
    output_kind = "image"
    agreements = (
        Agreement("width of the text encoder", ("text_encoder.hidden_size", "dit.text_dim")),
        Agreement("number of latent channels", ("vae.packed_channels", "dit.in_channels")),
    )

    def __call__(self, prompt: str | Sequence[str] = "", **arguments: Unpack[Flux2Arguments]) -> Any:
        """Generate one image, or several; see `Pipeline.__call__`."""
        return super().__call__(prompt, **arguments)

    def check(self, **arguments: Any) -> Request:
        """Check a call's arguments without running it; return them, completed with defaults, as a `Request`.

        Errors are those of the call.
        """
        request = super().check(**arguments)
        if self.dit is not None:
            loras = {name: parse_branch_lora(name, request.values[name]) or () for name in ("lora", "negative_lora")}
            self.branch_loras(loras, tuple(loras))  # raises for one that does not fit
        return request

    def velocity(
        self,
        latents: Float[Tensor, "b c h w"],
        sigma: Float[Tensor, "b"],
        *,
        prompt_embeds: Float[Tensor, "b s e"],
        network_guidance: Float[Tensor, "b"] | None = None,
        extensions: tuple[Extension, ...] = (),
        step: StepContext | None = None,
    ) -> Float[Tensor, "b c h w"]:
        """Return the velocity `noise - x0` of the latents, a tensor `b c h w`; see `Pipeline.velocity`."""
        return self.dit(latents, sigma, prompt_embeds, network_guidance, extensions=extensions, step=step)
