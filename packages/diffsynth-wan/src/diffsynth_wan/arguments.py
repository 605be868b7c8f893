"""The arguments of a Wan call, for editors; a contract test holds them equal to the units, both ways."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Sequence
from typing import Any, TypedDict

from PIL import Image

from diffsynth.runtime.acceleration.choice import StepCacheArgument
from diffsynth.runtime.acceleration.step_attention import AttentionArgument
from diffsynth.runtime.request import OutputType, Step
from diffsynth_wan.units.clips import Clip
from diffsynth_wan.units.control import Direction


class ShapeArguments(TypedDict, total=False):
    """How large the video is, and where it starts.

    Args:
        negative_prompt: what to steer away from; read when `cfg_scale` is not 1.
        height, width: pixels, at least 1; rounded up to a multiple of 16 (of 32 with the autoencoder of Wan 2.2).
        num_frames: at least 1; rounded up to 4 k + 1.
        rand_device: where noise is drawn; the CPU gives one video on every machine.
        sigma_shift: warp of the schedule towards noise, above 0.
        input_video: clip to start from: at least `num_frames` frames, or a tensor `1 3 t h w` in [-1, 1].
        denoising_strength: in (0, 1]; how far back towards noise the input video goes. All steps run at any strength.
        tiled: the autoencoder works in tiles where frames are larger than one.
        tile_size: height and width of a tile, in latent pixels.
        tile_stride: from one tile to the next, in latent pixels.
        sliding_window_size: latent frames that the network draws at once; None is all.
        sliding_window_stride: latent frames from one such window to the next; what is left is blended.
        switch_DiT_boundary: in [0, 1]; the noise level below which the second of two experts draws.
        cfg_merge: prompt and negative prompt go through the network as one batch, in more memory and fewer calls.
    """

    negative_prompt: str | Sequence[str]
    height: int
    width: int
    num_frames: int
    rand_device: str
    sigma_shift: float
    input_video: Clip | None
    denoising_strength: float
    tiled: bool
    tile_size: tuple[int, int]
    tile_stride: tuple[int, int]
    sliding_window_size: int | None
    sliding_window_stride: int | None
    switch_DiT_boundary: float
    cfg_merge: bool


class ImageArguments(TypedDict, total=False):
    """Images to begin and to end with.

    Args:
        input_image: the first frame, for image-to-video networks.
        end_image: the last frame, for networks that take one.
        reference_image: what the video looks like, for Fun-Control networks V1.1 and 2.2.
    """

    input_image: Image.Image | None
    end_image: Image.Image | None
    reference_image: Image.Image | None


class ControlArguments(TypedDict, total=False):
    """What the video follows.

    Args:
        control_video: poses, depth or edges, at least `num_frames` frames, for Fun-Control networks.
        camera_control_direction: where the camera turns, for Control-Camera networks; None leaves it at rest.
        camera_control_speed: change of the camera's matrix from frame to frame.
        camera_control_origin: the first camera, a line of 19 numbers; see `diffsynth_wan.units.camera_path.ORIGIN`.
        motion_bucket_id: how much moves, from 0 to 100, for the speed controller.
    """

    control_video: Clip | None
    camera_control_direction: Direction | None
    camera_control_speed: float
    camera_control_origin: tuple[float, ...]
    motion_bucket_id: float | None


class VaceArguments(TypedDict, total=False):
    """Of VACE.

    Args:
        vace_video: what the video follows or keeps, at least `num_frames` frames.
        vace_video_mask: white where it may change, a mask for each frame of `vace_video`; None is everywhere.
        vace_reference_image: what the video looks like: one image or several.
        vace_scale: how much VACE counts; 0 is not at all.
    """

    vace_video: Clip | None
    vace_video_mask: Clip | None
    vace_reference_image: Image.Image | Sequence[Image.Image] | None
    vace_scale: float


class AnimateArguments(TypedDict, total=False):
    """Of Animate; the character is `input_image`. Clips have at least `num_frames - 4` frames, and so many come out.

    Args:
        animate_pose_video: how the character moves.
        animate_face_video: its face.
        animate_inpaint_video: the scene that it is put into; None is a new one.
        animate_mask_video: white where the scene changes, a mask for each frame of `animate_inpaint_video`.
    """

    animate_pose_video: Clip | None
    animate_face_video: Clip | None
    animate_inpaint_video: Clip | None
    animate_mask_video: Clip | None


class Animate2Arguments(TypedDict, total=False):
    """Of Animate-2.

    Args:
        animate2_reference_image: the character.
        animate2_reference_video: how it moves, at least `num_frames` frames.
        animate2_prompt_ref: what the reference video shows.
        animate2_refert_images: end of the clip before this one, to go on from, fewer frames than `num_frames`; None for
            the first clip.
        animate2_offload_kv: keep what the network read of the reference video on the CPU, a block at a time on the
            device; the frames stay the same.
        animate2_log_scale: added to the attention to the first latent frame; -1.3 for the distilled model.
    """

    animate2_reference_image: Image.Image | None
    animate2_reference_video: Clip | None
    animate2_prompt_ref: str
    animate2_refert_images: Clip | None
    animate2_offload_kv: bool
    animate2_log_scale: float


class WanArguments(
    ShapeArguments,
    ImageArguments,
    ControlArguments,
    VaceArguments,
    AnimateArguments,
    Animate2Arguments,
    total=False,
):
    """All of a call but the prompt."""

    num_inference_steps: int
    cfg_scale: float
    seed: int | Sequence[int] | None
    num_images: int
    output_type: OutputType
    on_step: Callable[[Step], None] | None
    cancel: threading.Event | None
    progress_bar_cmd: Callable[[Iterable[Any]], Iterable[Any]]
    step_cache: StepCacheArgument
    attention: AttentionArgument
