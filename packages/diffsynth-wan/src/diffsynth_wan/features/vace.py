"""VACE: a control video, a mask of what may change in it, and reference images (arXiv:2503.07598)."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from itertools import repeat
from typing import Any, ClassVar, TypedDict

import torch
import torch.nn.functional as F
from einops import rearrange
from jaxtyping import Float
from PIL import Image
from torch import Tensor

from diffsynth.errors import MissingComponent
from diffsynth.runtime.feature import Condition, Configs, Feature, StepContext, in_window
from diffsynth.runtime.images import Images
from diffsynth.runtime.role import Agreement, Role
from diffsynth.runtime.unit import Phase, unit
from diffsynth.sampling.windows import Window
from diffsynth_wan.extension import Network, Stream, TokenScope
from diffsynth_wan.units.clips import Clip, check_call_clip, check_mask_clip
from diffsynth_wan.units.shape import VideoShape
from diffsynth_wan.variants.vace import VaceControl


class VaceArguments(TypedDict, total=False):
    """Inputs of VACE.

    Args:
        vace_video: Control video, or video to edit, with at least `num_frames` frames; None is a grey video.
        vace_video_mask: Video that is white where `vace_video` may change, with as many frames; None is all white.
        vace_reference_image: Image, or list of images, whose look the video takes over.
        vace_scale: Factor of VACE's effect; 0 disables it.
    """

    vace_video: Clip | None
    vace_video_mask: Clip | None
    vace_reference_image: Images
    vace_scale: float


@dataclass(frozen=True, eq=False)
class VaceCondition:
    """Extension that adds the hints of the VACE network of the expert that the step runs.

    Args:
        latents: control latents.
        scale: factor of the hints.
        expert_boundary: noise level below which `vace2` takes the place of `vace`; 0 for one expert.
    """

    latents: Float[Tensor, "1 c t h w"]
    scale: float
    expert_boundary: float = 0.0
    token_scope: ClassVar[TokenScope] = "part"

    def __call__(self, dit: Network, stream: Stream) -> Stream:
        """Return the stream with the hints as residuals; see `Extension`."""
        assert stream.step is not None, "the pipeline sets it"
        vace = stream.step.networks[vace_role(stream.step, self.expert_boundary)]
        control = self.latents.expand(len(stream.tokens), -1, -1, -1, -1)
        return VaceControl(vace, control, self.scale)(dit, stream)

    def in_window(self, window: Window) -> VaceCondition:
        """Return a `VaceCondition` with the control latents of the frames of `window`."""
        return replace(self, latents=window.cut(self.latents))


def vace_role(step: StepContext, expert_boundary: float) -> str:
    """Return "vace", or "vace2" for a step of the second expert."""
    return "vace2" if step.sigma < expert_boundary else "vace"


@unit("vace_references", "prefix_frames", requires=("vace",), phase=Phase.ENCODE)
def encode_vace_references(
    vae: Any,
    *,
    prefix_frames: int,
    vace_reference_image: Images = None,
    video_shape: VideoShape,
) -> tuple[Float[Tensor, "1 c t h w"] | None, int]:
    """Return (latents, number of prefix frames): latents `1 c t h w` of the reference images, a frame each, and
    `prefix_frames` plus their number; `(None, prefix_frames)` without images.
    """
    if vace_reference_image is None:
        return None, prefix_frames
    images = [vace_reference_image] if isinstance(vace_reference_image, Image.Image) else list(vace_reference_image)
    frames = [video_shape.encode_image(vae, image) for image in images]
    return torch.cat(frames, dim=2), prefix_frames + len(images)


def _ignored_scale(values: Mapping[str, Any]) -> dict[str, str]:
    inputs = ("vace_video", "vace_video_mask", "vace_reference_image")
    return {"vace_scale": "no input of VACE is given"} if all(values[name] is None for name in inputs) else {}


@unit("vace_condition", requires=("vace",), ignores=_ignored_scale)
def encode_vace_condition(
    vae: Any,
    *,
    vace_video: Clip | None = None,
    vace_video_mask: Clip | None = None,
    vace_references: Float[Tensor, "1 c t_prefix h w"] | None = None,
    vace_scale: float = 1.0,
    expert_boundary: float = 0.0,
    video_shape: VideoShape,
) -> VaceCondition | None:
    """Return a `VaceCondition`: latents of a video's kept and of its changeable pixels, and the mask, along the
    channels, with a scale; None without VACE inputs.

    The reference images are the first frames.

    A missing video is grey, and without a mask all of it may change.
    """
    if vace_video is None and vace_video_mask is None and vace_references is None:
        return None
    halves = (_masked(vace_video, vace_video_mask, video_shape, kept=kept) for kept in (True, False))
    frames = video_shape.num_frames
    video = torch.cat([video_shape.encode_pieces(vae, half, num_frames=frames) for half in halves], dim=1)
    mask = _folded_mask(vace_video_mask, video_shape)
    if vace_references is not None:
        blank = torch.zeros_like(vace_references)
        video = torch.cat([torch.cat([vace_references, blank], dim=1), video], dim=2)
        mask = F.pad(mask, (0, 0, 0, 0, vace_references.shape[2], 0))
    return VaceCondition(torch.cat([video, mask], dim=1), vace_scale, expert_boundary)


def _masked(clip: Clip | None, mask: Clip | None, shape: VideoShape, *, kept: bool) -> Iterator[Tensor]:
    """Yield a video in pieces (tensors of a few frames) with only the kept, or only the changeable, pixels; the other
    pixels are grey (0).
    """
    pieces = zip(_pieces("vace_video", clip, shape, missing=0.0), _mask_pieces(mask, shape), strict=True)
    for pixels, changeable in pieces:
        yield pixels * (1 - changeable if kept else changeable)


def _pieces(name: str, clip: Clip | None, shape: VideoShape, *, missing: float) -> Iterator[Tensor]:
    """Yield the pixels of `clip` as tensors of a few frames; if it is None, tensors filled with `missing`."""
    if clip is not None:
        yield from shape.clip_pieces(name, clip, num_frames=shape.num_frames, is_mask=name == "vace_video_mask")
        return
    for frames in (1, *repeat(shape.time_factor, shape.latent_size[0] - 1)):
        yield torch.full((1, 3, frames, shape.height, shape.width), missing)


def _mask_pieces(clip: Clip | None, shape: VideoShape) -> Iterator[Float[Tensor, "1 3 t height width"]]:
    """Yield a mask in pieces (tensors of a few frames): 1 for changeable pixels, 0 for kept ones; all 1 if `clip` is
    None.

    A lossy file has other levels, which VACE was not trained with.
    """
    for pixels in _pieces("vace_video_mask", clip, shape, missing=1.0):
        yield (pixels > 0).float()


def _folded_mask(clip: Clip | None, shape: VideoShape) -> Float[Tensor, "1 c t h w"]:
    """Return a mask `1 c t h w` whose channels are the pixels of a latent pixel: 1 for changeable pixels, 0 for kept
    ones; one video frame is used for each latent frame.
    """
    factor, frames = shape.vae_factor, shape.latent_size[0]
    masks = torch.cat([piece[:, :1] for piece in _mask_pieces(clip, shape)], dim=2)
    folded = rearrange(masks, "1 1 t (h p) (w q) -> 1 (p q) t h w", p=factor, q=factor)
    folded = F.interpolate(folded, size=(frames, *folded.shape[3:]), mode="nearest-exact")
    return folded.to(shape.device, shape.dtype)


def check(configs: Configs, values: Mapping[str, Any]) -> None:
    """Raise an error for inputs of VACE that do not fit the video or each other.

    Raises:
        ValueError: a clip is too short, of another size or of another length than its mask.
        MissingComponent: the VACE of one of two experts is not loaded.
    """
    for name in ("vace_video", "vace_video_mask"):
        check_call_clip(name, configs, values)
    if values["vace_video"] is not None and values["vace_video_mask"] is not None:
        check_mask_clip("vace_video_mask", "vace_video", values)
    if configs["dit2"] is not None and (configs["vace"] is None) != (configs["vace2"] is None):
        raise MissingComponent("only one of two experts has its VACE; add the files of the other expert")


def roles_at(step: StepContext, values: Mapping[str, Any]) -> tuple[str, ...]:
    """Return a tuple with the role of the VACE network that a step calls; empty for a call without VACE."""
    condition = values.get("vace_condition")
    return () if condition is None else (vace_role(step, condition.expert_boundary),)


VACE_NETWORK = Role(architectures=("wan_vace",), optional=True)

VACE = Feature(
    "vace",
    arguments=VaceArguments,
    roles={"vace": VACE_NETWORK, "vace2": VACE_NETWORK},
    loop_roles=("vace", "vace2"),
    agreements=(
        Agreement("width of the tokens", ("dit.dim", "vace.dim")),
        Agreement("width of the tokens", ("dit2.dim", "vace2.dim")),
    ),
    units=(encode_vace_references, encode_vace_condition),
    conditions={"vace_condition": Condition(in_window)},
    check=check,
    roles_at=roles_at,
)
