"""What a call is refused for before anything is decoded, encoded or brought to the device."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import isfinite
from typing import Any

from PIL import Image

from diffsynth.errors import MissingComponent
from diffsynth.runtime.request import Request
from diffsynth.runtime.unit import Program
from diffsynth_wan.config import WanDiTConfig
from diffsynth_wan.units.camera_path import check_camera
from diffsynth_wan.units.canvas import rounded_shape
from diffsynth_wan.units.clips import check_clip, clip_length
from diffsynth_wan.units.shape import asked_window

CLIPS = ("input_video", "control_video", "vace_video", "vace_video_mask", "animate2_reference_video")
ANIMATE_CLIPS = ("animate_pose_video", "animate_face_video", "animate_inpaint_video", "animate_mask_video")
CUT_UNITS = frozenset(
    {"stretch_canvas", "place_reference", "move_camera", "control_speed", "move_character", "follow_reference"}
)
"""Our units that write extensions, all of which can be cut into windows."""

IMAGES = ("input_image", "end_image", "reference_image", "animate2_reference_image")
ANIMATE2 = {
    "animate2_reference_image": None,
    "animate2_reference_video": None,
    "animate2_refert_images": None,
    "animate2_prompt_ref": " ",
    "animate2_offload_kv": False,
    "animate2_log_scale": 0.0,
}
"""Arguments of Animate-2, and their values in a call that gives none."""


def check_inputs(values: Mapping[str, Any], components: Mapping[str, Any]) -> None:
    """Hold the pictures and clips of a call to each other and to the loaded networks.

    Raises:
        ValueError: a clip too short, of mixed sizes or of another length than its mask, an end without a beginning, a
            picture that the network takes none of or one that it wants; the message says what to give.
        TypeError: no pictures at all.
        MissingComponent: the second expert's part, or the image encoder, is not loaded.
    """
    _check_clips(values, components["vae"])
    _check_images(values)
    _check_animate(values, components)
    if components["dit"] is not None:
        config = components["dit"].config
        _check_animate2(values, config)
        _check_network(values, config, components)


def check_windows(request: Request, program: Program, vae: Any) -> None:
    """Refuse to cut a video into windows where a condition could not be cut with it.

    A unit that writes `extensions` says that each of them has `in_window` by reading `sliding_window_size`; ours have.

    Raises:
        ValueError: such a unit is in use and does not say so; or a step cache, which knows one window; the message
            names it. Sizes that make no windows.
    """
    values = request.values
    asked = asked_window(values["sliding_window_size"], values["sliding_window_stride"])
    if asked is None or vae is None:
        return
    shape = (values["height"], values["width"], values["num_frames"])
    *_, frames = rounded_shape(*shape, vae_factor=vae.config.factor, time_factor=vae.config.time_factor)
    if len(asked.windows((frames - 1) // vae.config.time_factor + 1)) == 1:
        return
    if request.loop.step_cache is not None:
        raise ValueError(
            f"step_cache={request.loop.step_cache!r} with sliding_window_size={asked.size}: a cache keeps the last "
            "step of one window; leave one of the two out"
        )
    for step in program.units:
        knows = step.name in CUT_UNITS or any(read.name == "sliding_window_size" for read in step.reads)
        if "extensions" in step.writes and not knows and program.is_used(step, values):
            raise ValueError(
                f"{step.title} adds to the network what cannot be cut into windows; leave out sliding_window_size, or "
                f"what the unit is for. A unit whose extensions have in_window() says so by reading sliding_window_size"
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
        raise ValueError(f"num_frames={shape['num_frames']}: Animate spends 4 on the character; expected 5 or more")
    for name in ANIMATE_CLIPS:
        if values.get(name) is not None:
            face = name == "animate_face_video"
            check_clip(name, values[name], **shape | {"num_frames": shape["num_frames"] - 4}, fitted=not face)
    _check_ending(values, shape)
    video, mask = values.get("vace_video"), values.get("vace_video_mask")
    if video is not None and mask is not None:
        _check_mask(values, "vace_video_mask", "vace_video")


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
                raise TypeError(f"vace_reference_image holds {reference!r}; expected PIL images")
    if values.get("end_image") is not None and values.get("input_image") is None:
        raise ValueError("end_image without input_image; give the image that the video begins with, too")
    if values.get("end_image") is not None and values["num_frames"] < 2:
        raise ValueError(f"end_image with num_frames={values['num_frames']}: a video of one frame has no other end")


def _check_network(values: Mapping[str, Any], config: WanDiTConfig, components: Mapping[str, Any]) -> None:
    channels = config.in_channels - config.out_channels
    first, last = values.get("input_image"), values.get("end_image")
    takes_image = (channels > 0 or config.frame_times or config.image_dim > 0) and not config.reference_video
    takes_control = channels >= 2 * config.out_channels
    if first is not None and not takes_image:
        raise ValueError("input_image is given, but this network takes none; load an image-to-video model")
    if first is None and takes_image and channels > 0 and not takes_control:
        raise ValueError("this network draws videos that begin with an image; give input_image")
    if last is not None and (config.frame_times or channels == config.out_channels):
        raise ValueError("end_image is given, but this network takes an image for the beginning alone")
    if last is None and config.image_tokens:
        raise ValueError("this network draws what lies between two images; give end_image, too")
    if values.get("control_video") is None and takes_control:
        raise ValueError("this network follows a control video; give control_video")
    if values.get("control_video") is not None and not takes_control:
        raise ValueError("control_video is given, but this network takes none; load a Fun-Control model")
    if values.get("reference_image") is not None and not config.reference_channels:
        raise ValueError("reference_image is given, but this network takes none; load a Control model V1.1 or 2.2")
    direction = values.get("camera_control_direction")
    if direction is not None and not config.camera_channels:
        raise ValueError("camera_control_direction is given, but this network has no camera; load a Camera model")
    if direction is not None:
        check_camera(direction, values["camera_control_origin"])
    pictures = (first, last, values.get("reference_image"), values.get("animate2_reference_image"))
    if config.image_dim and components["image_encoder"] is None and any(each is not None for each in pictures):
        raise MissingComponent("this network looks at images through image_encoder; add the CLIP file to model_configs")
    if (components["vace"] is None) != (components["vace2"] is None) and components["dit2"] is not None:
        raise MissingComponent("one of two experts has VACE and the other has not; add the second expert's files")


def _check_animate(values: Mapping[str, Any], components: Mapping[str, Any]) -> None:
    pose, face, scene, mask = (values.get(name) is not None for name in ANIMATE_CLIPS)
    if components["animate_adapter"] is None:
        return  # arguments of an absent part were refused already
    if not pose or not face:
        missing = " and ".join(name for name, there in zip(ANIMATE_CLIPS, (pose, face), strict=False) if not there)
        raise ValueError(f"this model animates a character; give {missing}")
    if scene != mask:
        raise ValueError("animate_inpaint_video and animate_mask_video belong together; give both, or neither")
    if scene:
        _check_mask(values, "animate_mask_video", "animate_inpaint_video")


def _check_animate2(values: Mapping[str, Any], config: WanDiTConfig) -> None:
    if not config.reference_video:
        for name, default in ANIMATE2.items():
            value = values.get(name, default)
            if value is default or (default is not None and value == default):
                continue
            raise ValueError(f"{name} is given, but this network follows no reference video; load an Animate-2 model")
        return
    missing = [name for name in list(ANIMATE2)[:2] if values.get(name) is None]
    if missing:
        raise ValueError(f"this model animates a character as a video moves; give {' and '.join(missing)}")
    for name in ("input_image", "end_image", "input_video"):
        if values.get(name) is not None:
            raise ValueError(
                f"{name} is given, but this network takes a character as animate2_reference_image, and frames to go on "
                f"from as animate2_refert_images"
            )
    if not isinstance(values["animate2_prompt_ref"], str):
        raise TypeError(f"animate2_prompt_ref={values['animate2_prompt_ref']!r}: expected a text")
    log_scale = values["animate2_log_scale"]
    if isinstance(log_scale, bool) or not isinstance(log_scale, int | float) or not isfinite(log_scale):
        raise ValueError(f"animate2_log_scale={log_scale!r}: expected a number; 0, or -1.3 for the distilled model")


def _check_ending(values: Mapping[str, Any], shape: Mapping[str, int]) -> None:
    """The end of the clip before this one."""
    clip, name, frames = values.get("animate2_refert_images"), "animate2_refert_images", shape["num_frames"]
    if clip is None:
        return
    check_clip(name, clip, **{**shape, "num_frames": 1})
    if (length := clip_length(clip)) >= frames:
        raise ValueError(f"{name} has {length} frames and leaves none of {frames} to draw; give the last few of a clip")
    check_clip(name, clip, **{**shape, "num_frames": length})


def check_experts(names: Sequence[str]) -> None:
    """Refuse one expert without the other, by the folders that published models keep them in.

    Args:
        names: paths or patterns of the files that are about to be loaded.

    Raises:
        MissingComponent: there is `high_noise_model` and no `low_noise_model`, or the other way round.
    """
    high, low = (any(folder in name for name in names) for folder in ("high_noise_model", "low_noise_model"))
    if high != low:
        there, missing = ("high", "low") if high else ("low", "high")
        raise MissingComponent(
            f"model_configs has the {there}-noise expert alone; this model draws with two. "
            f"Add a ModelConfig for {missing}_noise_model/ of the same repository."
        )
