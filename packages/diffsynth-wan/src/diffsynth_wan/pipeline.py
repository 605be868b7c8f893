"""Wan pipeline: video from text, images and control videos (Wan team 2025, arXiv:2503.20314)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any, Unpack

import torch
from jaxtyping import Float
from torch import Tensor

from diffsynth.core.loader.config import ModelConfig
from diffsynth.core.parallel import init_distributed
from diffsynth.runtime.guidance_branches import check_merging
from diffsynth.runtime.memory_options import Policies
from diffsynth.runtime.pipeline import Pipeline
from diffsynth.runtime.request import LoopArguments, Request
from diffsynth.runtime.role import Processor, Role
from diffsynth_wan.arguments import WanArguments
from diffsynth_wan.checkpoints import CONVERTED, IMAGE_ENCODER_FILE, TEXT_ENCODER_FILE
from diffsynth_wan.extension import Extension
from diffsynth_wan.sharding import with_sharded_tokens
from diffsynth_wan.units import OUTPUT_UNITS, UNITS
from diffsynth_wan.units.checks import check_experts, check_inputs, check_windows
from diffsynth_wan.units.vace import VaceCondition
from diffsynth_wan.variants.vace import VaceControl
from diffsynth_wan.windows import SlidingWindow, blend_windows

COMMON_FILES = (f"{TEXT_ENCODER_FILE}.pth", f"{IMAGE_ENCODER_FILE}.pth", "Wan2.1_VAE.pth", "Wan2.2_VAE.pth")
"""Names of files that are the same in many repositories; the repository `CONVERTED` has them as safetensors."""

TENSORS = frozenset({"prompt_embeds", "image_embeds", "condition_latents", "first_latents"})
"""Names of conditions that `cfg_merge` can stack to one batch for both branches of guidance."""

OUTPUT_TYPES = {"quantized": "pil", "floatpoint": "tensor"}
"""Values of `output_type` in scripts for DiffSynth-Studio -> ours."""

DIT = Role(architectures=("wan_dit",))
OPTIONAL_DIT = Role(architectures=("wan_dit",), optional=True)
VACE = Role(architectures=("wan_vace",), optional=True)


class WanVideoPipeline(Pipeline):
    """Generates videos with Wan 2.1 and 2.2; the loaded networks determine which arguments a call accepts.

    With two experts, `dit` runs at high noise levels and `dit2` at low ones, in the order of `model_configs`.
    """

    roles = {
        "dit": DIT,
        "dit2": OPTIONAL_DIT,
        "text_encoder": Role(architectures=("wan_text_encoder",)),
        "image_encoder": Role(architectures=("wan_image_encoder",), optional=True),
        "vae": Role(architectures=("wan_autoencoder", "wan22_autoencoder")),
        "vace": VACE,
        "vace2": VACE,
        "animate_adapter": Role(architectures=("wan_animate_adapter",), optional=True),
        "motion_controller": Role(architectures=("wan_motion_controller",), optional=True),
        "tokenizer": Processor(source="Wan-AI/Wan2.1-T2V-1.3B:google/umt5-xxl/"),
    }
    units = UNITS
    output_units = OUTPUT_UNITS
    loop = LoopArguments(num_inference_steps=50, cfg_scale=5.0)
    loop_roles = ("dit", "vace", "animate_adapter")
    shares_tokens = True
    facts = {
        "in_channels": "dit.in_channels",
        "latent_channels": "dit.out_channels",
        "image_dim": "dit.image_dim",
        "image_tokens": "dit.image_tokens",
        "frame_times": "dit.frame_times",
        "vae_factor": "vae.factor",
        "time_factor": "vae.time_factor",
    }

    @classmethod
    def from_pretrained(
        cls,
        torch_dtype: torch.dtype = torch.bfloat16,
        device: torch.device | str | None = None,
        model_configs: Sequence[Any] = (),
        vram_limit: float | None = None,
        *,
        policy: Policies = None,
        redirect_common_files: bool = True,
        use_usp: bool = False,
        **processor_configs: Any,
    ) -> Pipeline:
        """Return a pipeline loaded from files; optional roles without a file are None; see `Pipeline.from_pretrained`.

        Args:
            torch_dtype, device, model_configs, vram_limit, policy, processor_configs: see `Pipeline.from_pretrained`.
            redirect_common_files: download text encoder, image encoder and autoencoder from one repository that has
                them as safetensors, rather than again for each model. Files that are already downloaded are used.
            use_usp: shard the tokens of a video over all processes that `torchrun` started, each with its own device,
                as `parallel()` does; for scripts for DiffSynth-Studio.

        Raises:
            MissingComponent: one of two experts is missing.
            Unavailable: `use_usp=True` in a process that `torchrun` did not start.
        """
        if use_usp:
            device = init_distributed(device)
        configs = [_redirected(config) if redirect_common_files else config for config in model_configs]
        check_experts([str(config) for config in configs])
        pipe = super().from_pretrained(torch_dtype, device, configs, vram_limit, policy=policy, **processor_configs)
        return pipe.parallel() if use_usp else pipe

    def __call__(self, prompt: str | Sequence[str] = "", **arguments: Unpack[WanArguments]) -> Any:
        """Generate one video, a list of frames, or several; see `Pipeline.__call__`.

        With `output_type="tensor"` videos are `b 3 t h w`; with "latents" they include prefix frames, such as the
        reference images of VACE.
        """
        return super().__call__(prompt, **arguments)

    def check(self, **arguments: Any) -> Request:
        """Check a call's arguments without running it; return them, completed with defaults, as a `Request`.

        Errors are those of the call.
        """
        if "output_type" in arguments:
            output_type = arguments["output_type"]
            arguments["output_type"] = OUTPUT_TYPES.get(output_type, output_type)
        request = super().check(**arguments)
        check_inputs(request.values, self.components)
        check_windows(request, self.program, self.components["vae"])
        if request.values["cfg_merge"] and request.loop.cfg_scale != 1:
            options = {"tensors": TENSORS, "conditions": self.conditions(), "axis": self.mesh.branches}
            check_merging(self.program, self.components, request.values, **options)
        return request

    def roles_at(self, sigma: float, values: Mapping[str, Any]) -> tuple[str, ...]:
        """Return a tuple of the roles (names of components, loaded or not) for noise level `sigma`: dit2, vace2 and
        animate_adapter below `values["expert_boundary"]` (0 if missing), else dit, vace and animate_adapter.
        """
        second = sigma < values.get("expert_boundary", 0.0)
        return ("dit2", "vace2", "animate_adapter") if second else self.loop_roles

    def velocity(
        self,
        latents: Float[Tensor, "b c t h w"],
        sigma: Float[Tensor, "b"],
        *,
        prompt_embeds: Float[Tensor, "b s e"],
        image_embeds: Float[Tensor, "#b i e_image"] | None = None,
        condition_latents: Float[Tensor, "#b c_condition t h w"] | None = None,
        first_latents: Float[Tensor, "#b c t_first h w"] | None = None,
        extensions: tuple[Extension, ...] = (),
        vace_condition: VaceCondition | None = None,
        expert_boundary: float = 0.0,
        sliding_window: SlidingWindow | None = None,
    ) -> Float[Tensor, "b c t h w"]:
        """Return the velocity `noise - x0` of the latents, a tensor `b c t h w`, 0 in the frames that `first_latents`
        gives; see `Pipeline.velocity`.

        All levels of a batch must belong to one expert, that is, be on one side of `expert_boundary`.

        Args:
            latents, sigma: see `Pipeline.velocity`.
            prompt_embeds: hidden states of the text encoder.
            image_embeds: hidden states of the image encoder.
            condition_latents: channels that are appended to those of the latents.
            first_latents: clean latents of the first frames, for a network with one noise level per frame.
            extensions: extensions of the transformer; see `diffsynth_wan.extension`.
            vace_condition: control latents and scale for VACE.
            expert_boundary: noise level below which the second expert runs.
            sliding_window: size and stride of windows for a long video; None processes all frames at once.
        """
        if sliding_window is not None:
            windows = sliding_window.windows(latents.shape[2] - sliding_window.prefix_frames)
            if len(windows) > 1:
                conditions = {
                    "prompt_embeds": prompt_embeds,
                    "image_embeds": image_embeds,
                    "condition_latents": condition_latents,
                    "first_latents": first_latents,
                    "extensions": extensions,
                    "vace_condition": vace_condition,
                    "expert_boundary": expert_boundary,
                }
                return blend_windows(partial(self.velocity, sigma=sigma), windows, latents, conditions)
        dit, vace = self._expert(sigma, expert_boundary)
        if vace_condition is not None:
            control = vace_condition.latents.expand(len(latents), -1, -1, -1, -1)
            extensions = (*extensions, VaceControl(vace, control, vace_condition.scale))
        extensions = with_sharded_tokens(extensions, self.mesh.tokens)
        time, given = sigma, 0
        if first_latents is not None:
            given = first_latents.shape[2]
            clean = first_latents.to(latents.dtype).expand(len(latents), -1, -1, -1, -1)
            latents = torch.cat([clean, latents[:, :, given:]], dim=2)
            time = sigma[:, None].repeat(1, latents.shape[2])
            time[:, :given] = 0
        image_embeds, condition_latents = (
            None if each is None else each.expand(len(latents), *each.shape[1:])
            for each in (image_embeds, condition_latents)
        )
        velocity = dit(latents, time, prompt_embeds, image_embeds, condition_latents, extensions=extensions)
        if given:
            velocity[:, :, :given] = 0  # given frames stay unchanged
        return velocity

    def _expert(self, sigma: Float[Tensor, "b"], boundary: float) -> tuple[Any, Any]:
        """Return (transformer, VACE network or None): those of the second expert if it is loaded and `sigma[0]` is
        below `boundary`, else those of the first.
        """
        if self.dit2 is None or float(sigma[0]) >= boundary:
            return self.dit, self.vace
        return self.dit2, self.vace2


def _redirected(config: ModelConfig) -> ModelConfig:
    """Return a `ModelConfig` for the same weights as safetensors in the repository `CONVERTED`; or `config` itself, if
    it names no file in `COMMON_FILES`, a local path, or a file already downloaded.

    `config` is returned for files that are not in `COMMON_FILES` or are already downloaded.
    """
    pattern = config.origin_file_pattern
    name = str(pattern).rpartition("/")[2]
    if config.model_id is None or name not in COMMON_FILES or (config.folder / str(pattern)).exists():
        return config
    shared = f"{name.removesuffix('.pth')}.safetensors"
    return replace(config, model_id=CONVERTED, origin_file_pattern=shared, revision=None)
