"""Wan pipeline: video from text, images and control videos (Wan team 2025, arXiv:2503.20314)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, Unpack

import torch
from jaxtyping import Float
from torch import Tensor

from diffsynth.core.loader.config import ModelConfig
from diffsynth.core.parallel import init_distributed
from diffsynth.errors import MissingComponent
from diffsynth.runtime.feature import Condition, StepContext, whole
from diffsynth.runtime.guidance_branches import check_merging
from diffsynth.runtime.loop import refuse_windows
from diffsynth.runtime.memory_options import Policies
from diffsynth.runtime.pipeline import Pipeline
from diffsynth.runtime.request import LoopArguments, Request
from diffsynth.runtime.role import Agreement, Role, Tokenizer
from diffsynth.sampling.windows import SlidingWindow
from diffsynth_wan.arguments import OTHER_ARGUMENTS, WanArguments
from diffsynth_wan.checkpoints import CONVERTED, IMAGE_ENCODER_FILE, TEXT_ENCODER_FILE
from diffsynth_wan.extension import Extension, FramePositions
from diffsynth_wan.features import FEATURES
from diffsynth_wan.sharding import with_sharded_tokens
from diffsynth_wan.units import OUTPUT_UNITS, UNITS
from diffsynth_wan.units.size import rounded_shape

COMMON_FILES = (f"{TEXT_ENCODER_FILE}.pth", f"{IMAGE_ENCODER_FILE}.pth", "Wan2.1_VAE.pth", "Wan2.2_VAE.pth")
"""Names of files that are the same in many repositories; the repository `CONVERTED` has them as safetensors."""

OUTPUT_TYPES = {"quantized": "pil", "floatpoint": "tensor"}
"""Values of `output_type` in scripts for DiffSynth-Studio -> ours."""


class WanVideoPipeline(Pipeline):
    """Generates videos with Wan 2.1 and 2.2; the loaded networks determine which arguments a call accepts.

    With two experts, `dit` runs at high noise levels and `dit2` at low ones, in the order of `model_configs`.
    """

    roles = {
        "dit": Role(architectures=("wan_dit",)),
        "dit2": Role(architectures=("wan_dit",), optional=True),
        "text_encoder": Role(architectures=("wan_text_encoder",)),
        "vae": Role(architectures=("wan_autoencoder", "wan22_autoencoder"), methods=("encode_pieces", "decode_pieces")),
        "tokenizer": Tokenizer(source="Wan-AI/Wan2.1-T2V-1.3B:google/umt5-xxl/"),
    }
    units = UNITS
    output_units = OUTPUT_UNITS
    features = FEATURES
    loop_roles = ("dit", "dit2")
    loop = LoopArguments(num_inference_steps=50, cfg_scale=5.0)
    conditions = {"prompt_embeds": Condition(whole), "expert_boundary": Condition(whole, batch="separate")}
    shares_tokens = True
    other_arguments = OTHER_ARGUMENTS
    output_kind = "video"
    facts = {
        "in_channels": "dit.in_channels",
        "latent_channels": "dit.out_channels",
        "vae_factor": "vae.factor",
        "time_factor": "vae.time_factor",
    }
    agreements = (
        Agreement("width of the text", ("text_encoder.dim", "dit.text_dim", "dit2.text_dim")),
        Agreement("number of latent channels", ("vae.latent_channels", "dit.out_channels", "dit2.out_channels")),
        Agreement("number of input channels", ("dit.in_channels", "dit2.in_channels")),
    )

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
        check_experts([str(config) for config in configs if config.role is None])
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
        if isinstance(output_type := arguments.get("output_type"), str):
            arguments["output_type"] = OUTPUT_TYPES.get(output_type, output_type)
        request = super().check(**arguments)
        values = request.values
        for name in (
            ("input_image", "end_image", "input_video") if values["animate2_reference_video"] is not None else ()
        ):
            if values[name] is not None:
                raise ValueError(
                    f"{name} is given, but this network takes the character as animate2_reference_image and the last "
                    f"frames of the previous clip as animate2_refert_images"
                )
        self._check_windows(request)
        if values["cfg_merge"] and len(request.branches) > 1:
            options = {"rules": self.condition_rules, "axis": self.mesh.branches, "argument": "cfg_merge"}
            check_merging(self.program, self.components, values, **options)
        return request

    def roles_at(self, step: StepContext, values: Mapping[str, Any]) -> tuple[str, ...]:
        """Return a tuple of the roles whose networks `velocity()` calls in a step: dit, in steps below
        `values["expert_boundary"]` (0 if missing) dit2, and those of the features in use.
        """
        other = "dit" if step.sigma < values.get("expert_boundary", 0.0) else "dit2"
        return tuple(role for role in super().roles_at(step, values) if role != other)

    def velocity(
        self,
        latents: Float[Tensor, "b c t h w"],
        sigma: Float[Tensor, "b"],
        *,
        prompt_embeds: Float[Tensor, "b s e"],
        image_embeds: Float[Tensor, "#b i e_image"] | None = None,
        condition_latents: Float[Tensor, "#b c_condition t h w"] | None = None,
        first_latents: Float[Tensor, "#b c t_first h w"] | None = None,
        expert_boundary: float = 0.0,
        extensions: tuple[Extension, ...] = (),
        step: StepContext | None = None,
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
            expert_boundary: noise level below which the second expert runs.
            extensions: extensions of the transformer; see `diffsynth_wan.extension`.
            step: the step of the loop; None outside of a loop.
        """
        step = self.step_outside(sigma) if step is None else step
        dit = self.dit if self.dit2 is None or step.sigma >= expert_boundary else self.dit2
        if step.window is not None:
            extensions = (FramePositions(step.window.frames), *extensions)
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
        velocity = dit(latents, time, prompt_embeds, image_embeds, condition_latents, extensions=extensions, step=step)
        if given:
            velocity[:, :, :given] = 0  # given frames stay unchanged
        return velocity

    def _check_windows(self, request: Request) -> None:
        """Raise ValueError if a call needs several sliding windows and has a step cache or a condition that cannot be
        cut, or if the window sizes are invalid.
        """
        values, vae = request.values, self.components["vae"]
        sliding = SlidingWindow.from_arguments(values["sliding_window_size"], values["sliding_window_stride"])
        if sliding is None or vae is None:
            return
        size = (values["height"], values["width"], values["num_frames"])
        *_, frames = rounded_shape(*size, vae_factor=vae.config.factor, time_factor=vae.config.time_factor)
        if len(sliding.windows((frames - 1) // vae.config.time_factor + 1)) == 1:
            return
        if request.loop.step_cache is not None:
            raise ValueError(
                f"step_cache={request.loop.step_cache!r} with sliding_window_size={sliding.size}: a step cache stores "
                "the last step of one window; leave out one of the two"
            )
        refuse_windows(self, values)


def check_experts(names: Sequence[str]) -> None:
    """Raise MissingComponent if just one of `high_noise_model` and `low_noise_model` (the folders of two experts)
    occurs in `names`, paths of files.

    Args:
        names: paths or patterns of the files to load.

    Raises:
        MissingComponent: only one of `high_noise_model` and `low_noise_model` is among them.
    """
    high, low = (any(folder in name for name in names) for folder in ("high_noise_model", "low_noise_model"))
    if high != low:
        there, missing = ("high", "low") if high else ("low", "high")
        raise MissingComponent(
            f"model_configs has only the {there}-noise expert of a model with two experts. "
            f"Add a ModelConfig for {missing}_noise_model/ of the same repository."
        )


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
