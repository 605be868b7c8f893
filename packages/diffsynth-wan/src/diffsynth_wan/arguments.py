"""Arguments of a Wan call, typed for editors; a contract test keeps them equal to what the units read."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Sequence
from typing import Any, TypedDict

from PIL import Image

from diffsynth.runtime.acceleration import AttentionArgument, StepCacheArgument
from diffsynth.runtime.request import OutputType, Step
from diffsynth_wan.units.camera import Direction
from diffsynth_wan.units.clips import Clip


class ShapeArguments(TypedDict, total=False):
    """Negative prompt, size, input video, and how the video is computed.

    Args:
        negative_prompt: Text that guidance steers away from; used only if `cfg_scale` is not 1.
        height, width: Size of the video in pixels, at least 1; rounded up to a multiple of 16, or of 32 with the
            autoencoder of Wan 2.2.
        num_frames: Number of frames of the video, at least 1; rounded up to 4n + 1.
        rand_device: Device on which the initial noise is generated; "cpu" gives the same noise on every machine.
        sigma_shift: Shift of the noise schedule, above 0; larger values spend more steps at high noise levels.
        input_video: Video to start from: at least `num_frames` frames, or a tensor `1 3 t h w` in [-1, 1]; None starts
            from pure noise.
        denoising_strength: Noise level that the input video is raised to, in (0, 1]; 1 ignores the input. The number
            of steps stays the same.
        tiled: Whether the autoencoder works in overlapping tiles if a frame is larger than one tile.
        tile_size: Height and width of a tile in latent pixels.
        tile_stride: Distance between neighbouring tiles in latent pixels, vertical and horizontal; at most the size.
        sliding_window_size: Number of latent frames that the network processes at once; None processes all.
        sliding_window_stride: Distance between neighbouring windows in latent frames; overlapping frames are blended.
        switch_DiT_boundary: Noise level in [0, 1] below which the second of two experts takes over.
        cfg_merge: Whether prompt and negative prompt go through the network as one batch: fewer calls, more memory.
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
    """First and last frame, and reference image.

    Args:
        input_image: First frame of the video, for image-to-video models; the character's image for Animate.
        end_image: Last frame of the video, for models that take one; None leaves it free.
        reference_image: Image whose look the video takes over, for Fun-Control models V1.1 and 2.2.
    """

    input_image: Image.Image | None
    end_image: Image.Image | None
    reference_image: Image.Image | None


class ControlArguments(TypedDict, total=False):
    """Control video, camera path and amount of motion.

    Args:
        control_video: Video of poses, depth or edges with at least `num_frames` frames, for Fun-Control models.
        camera_control_direction: Direction in which the camera turns, for Control-Camera models; None disables camera
            control.
        camera_control_speed: Change of the camera's matrix from frame to frame.
        camera_control_origin: First camera, 19 numbers; see `diffsynth_wan.units.camera.ORIGIN`.
        motion_bucket_id: Amount of motion from 0 to 100, for the speed control model; None disables speed control.
    """

    control_video: Clip | None
    camera_control_direction: Direction | None
    camera_control_speed: float
    camera_control_origin: tuple[float, ...]
    motion_bucket_id: float | None


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
    vace_reference_image: Image.Image | Sequence[Image.Image] | None
    vace_scale: float


class AnimateArguments(TypedDict, total=False):
    """Inputs of Animate, with the character's image as `input_image`.

    The videos need at least `num_frames - 4` frames, which is the number of frames of the result.

    Args:
        animate_pose_video: Pose video that the character follows.
        animate_face_video: Face video that the character's expression follows.
        animate_inpaint_video: Scene that the character is placed in; None generates the scene.
        animate_mask_video: Video that is white where the scene changes, with as many frames as `animate_inpaint_video`.
    """

    animate_pose_video: Clip | None
    animate_face_video: Clip | None
    animate_inpaint_video: Clip | None
    animate_mask_video: Clip | None


class Animate2Arguments(TypedDict, total=False):
    """Inputs of Animate-2.

    Args:
        animate2_reference_image: Image of the character.
        animate2_reference_video: Video whose motion the character follows, with at least `num_frames` frames.
        animate2_prompt_ref: Prompt that describes the reference video.
        animate2_refert_images: Last frames of the previous clip to continue from, fewer than `num_frames`; None for the
            first clip.
        animate2_offload_kv: Whether keys and values of the reference video are stored on the CPU and copied to the
            device block by block; the result is the same.
        animate2_log_scale: Number that is added to the scores of attention to the first latent frame; 0, or -1.3 for
            the distilled model.
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
    """All arguments of a call except the prompt."""

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
