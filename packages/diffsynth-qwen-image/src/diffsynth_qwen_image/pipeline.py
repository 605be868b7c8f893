"""Qwen-Image pipeline: text and image to image, inpainting, editing, layers.

Qwen-Image team 2025, arXiv:2508.02324.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Unpack

from jaxtyping import Bool, Float
from torch import Tensor

from diffsynth.runtime.feature import Condition, StepContext
from diffsynth.runtime.image_units import decode_image
from diffsynth.runtime.pipeline import Pipeline
from diffsynth.runtime.request import LoopArguments, Request
from diffsynth.runtime.role import Agreement, Role, Tokenizer
from diffsynth_qwen_image.arguments import QwenImageArguments
from diffsynth_qwen_image.extension import Extension
from diffsynth_qwen_image.features import FEATURES
from diffsynth_qwen_image.units import UNITS

_LENGTHS_DIFFER = Condition("an image has no frames", batch="separate")


class QwenImagePipeline(Pipeline):
    """Generates and edits images with Qwen-Image, Qwen-Image-Edit and networks of their architecture."""

    roles = {
        "dit": Role(architectures=("qwen_image_dit",)),
        "text_encoder": Role(architectures=("qwen2.5_vl_text_encoder",)),
        "vae": Role(architectures=("wan_autoencoder",), methods=("encode", "decode")),
        "tokenizer": Tokenizer(source="Qwen/Qwen-Image:tokenizer/"),
    }
    units = UNITS
    features = FEATURES
    conditions = {"prompt_embeds": _LENGTHS_DIFFER, "prompt_mask": _LENGTHS_DIFFER}
    output_units = (decode_image,)
    loop = LoopArguments(num_inference_steps=30, cfg_scale=4.0)
    other_arguments = {
        "enable_fp8_attention": (
            "attention='sage_attention' takes its place, whose scores have 8 bits; no call of DiffSynth-Studio took it"
        ),
    }
    facts = {"latent_channels": "dit.in_channels"}
    agreements = (
        Agreement("width of the text encoder", ("text_encoder.hidden_size", "dit.prompt_dim")),
        Agreement("number of latent channels", ("vae.latent_channels", "dit.in_channels")),
    )
    output_kind = "image"

    def __call__(self, prompt: str | Sequence[str] = "", **arguments: Unpack[QwenImageArguments]) -> Any:
        """Generate one image, or several; see `Pipeline.__call__`."""
        return super().__call__(prompt, **arguments)

    def check(self, **arguments: Any) -> Request:
        """Check a call's arguments without running it; return them, completed with defaults, as a `Request`.

        Errors are those of the call.
        """
        request = super().check(**arguments)
        sigmas, steps = request.values["sigmas"], request.loop.num_inference_steps
        if sigmas is not None and len(sigmas) != steps:
            raise ValueError(
                f"sigmas has {len(sigmas)} noise levels and num_inference_steps is {steps}; pass "
                f"num_inference_steps={len(sigmas)}"
            )
        return request

    def velocity(
        self,
        latents: Float[Tensor, "b c *t h w"],
        sigma: Float[Tensor, "b"],
        *,
        prompt_embeds: Float[Tensor, "b s e"],
        prompt_mask: Bool[Tensor, "b s"] | None = None,
        extensions: tuple[Extension, ...] = (),
        step: StepContext | None = None,
    ) -> Float[Tensor, "b c *t h w"]:
        """Return the velocity `noise - x0`, a tensor of the shape of `latents`, those of an image or of the `t` layers
        of one; see `Pipeline.velocity`.
        """
        return self.dit(latents, sigma, prompt_embeds, prompt_mask, extensions=extensions, step=step)
