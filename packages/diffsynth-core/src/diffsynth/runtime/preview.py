"""Small images of latents while a call runs: `Pipeline.decode_preview`."""

from __future__ import annotations

from typing import Any

import torch
from einops import rearrange
from torch import Tensor
from torch.nn import functional

from diffsynth.core.arguments import check_tensors
from diffsynth.core.progress import reporting
from diffsynth.core.torch_defaults import torch_defaults
from diffsynth.errors import InvalidPipeline, MissingComponent, PipelineError
from diffsynth.runtime.role import member_roles
from diffsynth.runtime.unit import Phase, needed_for, needed_roles


class PreviewMethods:
    """Methods of a pipeline that show latents."""

    @torch_defaults()
    @torch.no_grad()
    def decode_preview(self: Any, latents: Tensor, *, max_size: int = 32, max_frames: int = 5) -> Any:
        """Return small images of latents, such as `step.x0` in `on_step`, by the pipeline's own autoencoder.

        The latents are averaged to at most `max_size` latent pixels a side, and the first output unit of the pipeline
        decodes them: at 32 a FLUX.1 image of 1024 pixels becomes one of 256, in a sixteenth of the time. A call that
        runs is not changed. Where the autoencoder is under a policy, the networks of the loop leave the device for it
        and are loaded again, so that a limit is kept; another thread waits until no stage runs.

        Args:
            latents: `b c h w` or `b c t h w` of the pipeline, of any dtype, on any device.
            max_size: the largest height and width in latent pixels, at least 1.
            max_frames: latent frames of a video that are decoded, evenly chosen, at least 1. Prefix frames, such as
                references, count as frames.

        Returns:
            what a call returns with `output_type="pil"`: an image, or a list of the frames or layers; a list of those
            for several entries.

        Raises:
            TypeError: `latents` is no floating-point tensor.
            ValueError: latents of another number of axes, or a size below 1.
            MissingComponent: the autoencoder is not loaded.
            PipelineError: the pipeline has no output unit, or one that needs values which only a call has.
            NotFinite: the latents hold NaN or infinity.
        """
        check_tensors(latents=latents)
        for name, value in (("max_size", max_size), ("max_frames", max_frames)):
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise ValueError(f"{name}={value!r}: expected an integer of at least 1")
        if latents.ndim not in (4, 5):
            raise ValueError(f"latents of shape {tuple(latents.shape)}; expected b c h w, or b c t h w")
        if latents.ndim == 5 and self.output_kind == "video":
            latents = _some_frames(latents, max_frames)
        units, roles = _decoding(self)
        small = _averaged(latents.to(self.device, torch.float32), max_size).to(self.dtype)
        values = {"latents": small, "batch_size": len(small), "output_type": "pil"}
        if "tiled" in self.program.arguments:
            values["tiled"] = False
        on_device = self._offloader.briefly_on_device(member_roles(roles, self.components))
        with self.running_calls.entered(), reporting(), on_device:
            try:
                output = self.run_units(units, values)["output"]
            except InvalidPipeline as error:
                raise PipelineError(f"decode_preview cannot run {units[-1].title} outside of a call: {error}") from None
        return output[0] if isinstance(output, list) and len(output) == len(small) == 1 else output


def _decoding(pipe: Any) -> tuple[tuple[Any, ...], tuple[str, ...]]:
    """Return the units that decode latents, with those that make sizes and tiles for them, and the roles they use."""
    outputs = pipe.program.outputs
    last = next((index for index, step in enumerate(outputs) if "output" in step.writes), None)
    if last is None:
        raise PipelineError(
            f"{type(pipe).__name__} has no output unit that writes 'output', so nothing decodes latents"
        )
    decoding = outputs[: last + 1]
    for step in decoding:
        if missing := [role for role in needed_roles(step) if pipe.components.get(role) is None]:
            raise MissingComponent(f"decode_preview needs {' and '.join(missing)}, which is not loaded")
    plain = [step for step in pipe.program.units if step.phase is Phase.SHAPE and not step.roles and not step.requires]
    read = {read.name for step in decoding for read in step.reads}
    return (*needed_for(plain, read), *decoding), tuple(role for step in decoding for role in step.roles)


def _some_frames(latents: Tensor, count: int) -> Tensor:
    """Return at most `count` frames of latents `b c t h w`, evenly chosen, the first and the last included."""
    frames = latents.shape[2]
    if frames <= count:
        return latents
    return latents[:, :, torch.linspace(0, frames - 1, count).round().long().to(latents.device)]


def _averaged(latents: Tensor, side: int) -> Tensor:
    """Return latents `b c *t h w` averaged to at most `side` latent pixels a side, in their proportions."""
    height, width = latents.shape[-2:]
    scale = side / max(height, width)
    if scale >= 1:
        return latents
    size = (max(1, round(height * scale)), max(1, round(width * scale)))
    if latents.ndim == 4:
        return functional.interpolate(latents, size, mode="area")
    frames = functional.interpolate(rearrange(latents, "b c t h w -> (b t) c h w"), size, mode="area")
    return rearrange(frames, "(b t) c h w -> b c t h w", b=len(latents))
