"""Checks of a call's arguments against each other and against the loaded networks, before anything runs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import isfinite
from typing import Any

from PIL import Image

from diffsynth.errors import MissingComponent
from diffsynth.runtime.request import Request
from diffsynth.runtime.unit import Program
from diffsynth_wan.config import WanDiTConfig
from diffsynth_wan.units import UNITS
from diffsynth_wan.units.camera import check_camera
from diffsynth_wan.units.clips import check_clip, clip_length
from diffsynth_wan.units.shape import rounded_shape
from diffsynth_wan.windows import SlidingWindow

CLIPS = ("input_video", "control_video", "vace_video", "vace_video_mask", "animate2_reference_video")
ANIMATE_CLIPS = ("animate_pose_video", "animate_face_video", "animate_inpaint_video", "animate_mask_video")
IMAGES = ("input_image", "end_image", "reference_image", "animate2_reference_image")

ANIMATE2_DEFAULTS = {
    "animate2_reference_image": None,
    "animate2_reference_video": None,
    "animate2_refert_images": None,
    "animate2_prompt_ref": " ",
    "animate2_offload_kv": False,
    "animate2_log_scale": 0.0,
}
"""Arguments of Animate-2 -> their defaults; another network refuses other values."""


def check_inputs(values: Mapping[str, Any], components: Mapping[str, Any]) -> None:
    """Raise an error unless the images and clips of a call fit each other and the loaded networks.

    Raises:
        ValueError: a clip is too short, of mixed sizes or of another length than its mask; an end image without an
            input image; an input that the network does not take, or a missing one that it needs.
        TypeError: an argument is no image or no clip.
        MissingComponent: the VACE of one of two experts, or the image encoder, is not loaded.
    """
    _check_clips(values, components["vae"])
    _check_images(values)
    _check_animate(values, components)
    if components["dit"] is not None:
        config = components["dit"].config
        _check_animate2(values, config)
        _check_network(values, config, components)


def check_windows(request: Request, program: Program, vae: Any) -> None:
    """Raise ValueError if a call needs several sliding windows and has a step cache, or a unit whose extensions may not
    support windows, or if the window sizes are invalid.

    All extensions of the units in `UNITS` have `in_window`. A plugin's unit that writes `extensions` declares the same
    for its own by reading `sliding_window_size`.

    Raises:
        ValueError: a step cache, or a unit that does not declare it, is used with several windows; the window sizes
            are invalid.
    """
    values = request.values
    sliding = SlidingWindow.from_arguments(values["sliding_window_size"], values["sliding_window_stride"])
    if sliding is None or vae is None:
        return
    shape = (values["height"], values["width"], values["num_frames"])
    *_, frames = rounded_shape(*shape, vae_factor=vae.config.factor, time_factor=vae.config.time_factor)
    if len(sliding.windows((frames - 1) // vae.config.time_factor + 1)) == 1:
        return
    if request.loop.step_cache is not None:
        raise ValueError(
            f"step_cache={request.loop.step_cache!r} with sliding_window_size={sliding.size}: a step cache stores the "
            "last step of one window; leave out one of the two"
        )
    own = {step.name for step in UNITS}
    for step in program.units:
        supports_windows = step.name in own or any(read.name == "sliding_window_size" for read in step.reads)
        if "extensions" in step.writes and not supports_windows and program.is_used(step, values):
            raise ValueError(
                f"{step.title} adds extensions that may not support sliding windows; leave out sliding_window_size, or "
                f"the arguments of the unit. If its extensions have in_window(), let the unit read sliding_window_size"
            )


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


def _check_clips(values: Mapping[str, Any], vae: Any) -> None:
    shape = {"height": values["height"], "width": values["width"], "num_frames": values["num_frames"]}
    if vae is not None:
        names = ("height", "width", "num_frames")
        config = vae.config
        rounded = rounded_shape(**shape, vae_factor=config.factor, time_factor=config.time_factor)
        shape = dict(zip(names, rounded, strict=True))
    for name in CLIPS:
        if values.get(name) is not None:
            check_clip(name, values[name], **shape)
    if values.get("animate_pose_video") is not None and shape["num_frames"] < 5:
        raise ValueError(
            f"num_frames={shape['num_frames']}: expected at least 5; Animate uses 4 frames for the character's image"
        )
    for name in ANIMATE_CLIPS:
        if values.get(name) is not None:
            frames = {"num_frames": shape["num_frames"] - 4}
            check_clip(name, values[name], **shape | frames, any_size=name == "animate_face_video")
    _check_previous_clip(values, shape)
    if values.get("vace_video") is not None and values.get("vace_video_mask") is not None:
        _check_mask(values, "vace_video_mask", "vace_video")


def _check_previous_clip(values: Mapping[str, Any], shape: Mapping[str, int]) -> None:
    clip, name, frames = values.get("animate2_refert_images"), "animate2_refert_images", shape["num_frames"]
    if clip is None:
        return
    check_clip(name, clip, **{**shape, "num_frames": 1})
    if (length := clip_length(clip)) >= frames:
        raise ValueError(f"{name} has {length} frames; expected fewer than num_frames={frames}, the last few of a clip")
    check_clip(name, clip, **{**shape, "num_frames": length})


def _check_mask(values: Mapping[str, Any], mask: str, video: str) -> None:
    masks, frames = clip_length(values[mask]), clip_length(values[video])
    if masks != frames:
        raise ValueError(f"{mask} has {masks} frames, {video} {frames}; expected one mask for each frame")


def _check_images(values: Mapping[str, Any]) -> None:
    for name in IMAGES:
        image = values.get(name)
        if image is not None and not isinstance(image, Image.Image):
            raise TypeError(f"{name}={image!r}: expected a PIL image")
    references = values.get("vace_reference_image")
    if references is not None and not isinstance(references, Image.Image):
        if not isinstance(references, Sequence) or not references:
            raise TypeError(f"vace_reference_image={references!r}: expected a PIL image, or a list of them")
        for reference in references:
            if not isinstance(reference, Image.Image):
                raise TypeError(f"vace_reference_image contains {reference!r}; expected PIL images")
    if values.get("end_image") is not None and values.get("input_image") is None:
        raise ValueError("end_image without input_image; pass the first image of the video, too")
    if values.get("end_image") is not None and values["num_frames"] < 2:
        raise ValueError(f"end_image with num_frames={values['num_frames']}: expected at least 2 frames")


def _check_network(values: Mapping[str, Any], config: WanDiTConfig, components: Mapping[str, Any]) -> None:
    channels = config.in_channels - config.out_channels
    first, last = values.get("input_image"), values.get("end_image")
    takes_image = (channels > 0 or config.frame_times or config.image_dim > 0) and not config.reference_video
    takes_control = channels >= 2 * config.out_channels
    if first is not None and not takes_image:
        raise ValueError("input_image is given, but this network takes none; load an image-to-video model")
    if first is None and takes_image and channels > 0 and not takes_control:
        raise ValueError("this network needs an image to begin with; pass input_image")
    if last is not None and (config.frame_times or channels == config.out_channels):
        raise ValueError("end_image is given, but this network takes a first image only")
    if last is None and config.image_tokens:
        raise ValueError("this network needs a first and a last image; pass end_image, too")
    if values.get("control_video") is None and takes_control:
        raise ValueError("this network needs a control video; pass control_video")
    if values.get("control_video") is not None and not takes_control:
        raise ValueError("control_video is given, but this network takes none; load a Fun-Control model")
    if values.get("reference_image") is not None and not config.reference_channels:
        raise ValueError("reference_image is given, but this network takes none; load a Control model V1.1 or 2.2")
    direction = values.get("camera_control_direction")
    if direction is not None and not config.camera_channels:
        raise ValueError("camera_control_direction is given, but this network takes none; load a Control-Camera model")
    if direction is not None:
        check_camera(direction, values["camera_control_origin"])
    images = (first, last, values.get("reference_image"), values.get("animate2_reference_image"))
    if config.image_dim and components["image_encoder"] is None and any(image is not None for image in images):
        raise MissingComponent("this network needs image_encoder for images; add the CLIP file to model_configs")
    if (components["vace"] is None) != (components["vace2"] is None) and components["dit2"] is not None:
        raise MissingComponent("only one of two experts has its VACE; add the files of the other expert")


def _check_animate(values: Mapping[str, Any], components: Mapping[str, Any]) -> None:
    pose, face, scene, mask = (values.get(name) is not None for name in ANIMATE_CLIPS)
    if components["animate_adapter"] is None:
        return  # `Pipeline.check` has refused arguments whose component is not loaded
    if not pose or not face:
        missing = " and ".join(name for name, there in zip(ANIMATE_CLIPS, (pose, face), strict=False) if not there)
        raise ValueError(f"this model needs a pose video and a face video; pass {missing}")
    if scene != mask:
        raise ValueError("only one of animate_inpaint_video and animate_mask_video is given; pass both or neither")
    if scene:
        _check_mask(values, "animate_mask_video", "animate_inpaint_video")


def _check_animate2(values: Mapping[str, Any], config: WanDiTConfig) -> None:
    if not config.reference_video:
        for name, default in ANIMATE2_DEFAULTS.items():
            value = values.get(name, default)
            if value is default or (default is not None and value == default):
                continue
            raise ValueError(f"{name} is given, but this network takes no reference video; load an Animate-2 model")
        return
    needed = ("animate2_reference_image", "animate2_reference_video")
    missing = [name for name in needed if values.get(name) is None]
    if missing:
        raise ValueError(f"this model needs a character's image and a reference video; pass {' and '.join(missing)}")
    for name in ("input_image", "end_image", "input_video"):
        if values.get(name) is not None:
            raise ValueError(
                f"{name} is given, but this network takes the character as animate2_reference_image and the last "
                f"frames of the previous clip as animate2_refert_images"
            )
    if not isinstance(values["animate2_prompt_ref"], str):
        raise TypeError(f"animate2_prompt_ref={values['animate2_prompt_ref']!r}: expected a text")
    log_scale = values["animate2_log_scale"]
    if isinstance(log_scale, bool) or not isinstance(log_scale, int | float) or not isfinite(log_scale):
        raise ValueError(f"animate2_log_scale={log_scale!r}: expected a number; 0, or -1.3 for the distilled model")
