"""Z-Image pipeline: text to image and image to image (Tongyi-MAI 2025, arXiv:2511.22699)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Unpack

import torch
from jaxtyping import Float
from torch import Tensor

from diffsynth.runtime.feature import Condition, StepContext, whole
from diffsynth.runtime.image_units import decode_image
from diffsynth.runtime.memory_options import Policies
from diffsynth.runtime.pipeline import Pipeline
from diffsynth.runtime.request import LoopArguments
from diffsynth.runtime.role import Agreement, Role, Tokenizer
from diffsynth_zimage.arguments import ZImageArguments
from diffsynth_zimage.extension import Extension
from diffsynth_zimage.features import FEATURES
from diffsynth_zimage.tokens import PromptMask
from diffsynth_zimage.units import UNITS


class ZImagePipeline(Pipeline):
    """Generates images with Z-Image, Z-Image-Turbo, Z-Image-Omni-Base, which also takes reference images, and
    z-image-nano.
    """

    roles = {
        "dit": Role(architectures=("z_image_dit", "z_image_omni_dit")),
        "text_encoder": Role(architectures=("qwen3_text_encoder",)),
        "vae": Role(architectures=("flux_autoencoder",), methods=("encode", "decode")),
        "tokenizer": Tokenizer(source="Tongyi-MAI/Z-Image-Turbo:tokenizer/"),
    }
    units = UNITS
    features = FEATURES
    conditions = {"prompt_embeds": Condition(whole), "prompt_mask": Condition(whole)}
    output_units = (decode_image,)
    loop = LoopArguments(num_inference_steps=8)
    other_arguments = {
        "lora": "positive_only_lora takes its place, with the same tensors; template models are not run for Z-Image",
        "negative_lora": "negative_only_lora takes its place, with the same tensors; template models are not run for "
        "Z-Image",
    }
    facts = {"latent_channels": "dit.in_channels"}
    agreements = (
        Agreement("width of the caption", ("text_encoder.hidden_size", "dit.cap_feat_dim")),
        Agreement("number of latent channels", ("vae.latent_channels", "dit.in_channels")),
    )
    output_kind = "image"

    @classmethod
    def from_pretrained(
        cls,
        torch_dtype: torch.dtype = torch.bfloat16,
        device: torch.device | str | None = None,
        model_configs: Sequence[Any] = (),
        vram_limit: float | None = None,
        *,
        policy: Policies = None,
        enable_npu_patch: bool = True,
        **processor_configs: Any,
    ) -> Pipeline:
        """Return a pipeline loaded from files; optional roles without a file are None; see `Pipeline.from_pretrained`.

        Args:
            torch_dtype, device, model_configs, vram_limit, policy, processor_configs: see `Pipeline.from_pretrained`.
            enable_npu_patch: accepted for scripts for DiffSynth-Studio and not used: kernels are selected by device in
                each call, and no library is patched.

        Raises:
            TypeError: `enable_npu_patch` is no bool.
        """
        if not isinstance(enable_npu_patch, bool):
            raise TypeError(f"enable_npu_patch={enable_npu_patch!r}: expected True or False")
        return super().from_pretrained(
            torch_dtype, device, model_configs, vram_limit, policy=policy, **processor_configs
        )

    def __call__(self, prompt: str | Sequence[str] = "", **arguments: Unpack[ZImageArguments]) -> Any:
        """Generate one image, or several; see `Pipeline.__call__`."""
        return super().__call__(prompt, **arguments)

    def velocity(
        self,
        latents: Float[Tensor, "b c h w"],
        sigma: Float[Tensor, "b"],
        *,
        prompt_embeds: Float[Tensor, "b s e"],
        prompt_mask: PromptMask,
        extensions: tuple[Extension, ...] = (),
        step: StepContext | None = None,
    ) -> Float[Tensor, "b c h w"]:
        """Return the velocity `noise - x0` of the latents, a tensor `b c h w`; see `Pipeline.velocity`."""
        # Z-Image's network runs time backwards: it takes 1 - sigma and returns -v.
        return -self.dit(latents, 1 - sigma, prompt_embeds, prompt_mask, extensions=extensions, step=step)
