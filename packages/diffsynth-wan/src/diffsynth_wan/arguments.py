"""Arguments of a Wan call, typed for editors; a contract test keeps them equal to what the units read."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypedDict

from diffsynth.core.data.image import ResizeMode
from diffsynth.runtime.argument_types import RandDevice
from diffsynth.runtime.request import LoopKeywords
from diffsynth_wan.features.animate import AnimateArguments
from diffsynth_wan.features.animate2 import Animate2Arguments
from diffsynth_wan.features.camera import CameraArguments
from diffsynth_wan.features.control import ControlArguments
from diffsynth_wan.features.image import ImageArguments
from diffsynth_wan.features.speed import SpeedArguments
from diffsynth_wan.features.vace import VaceArguments
from diffsynth_wan.features.video import VideoArguments


class ShapeArguments(TypedDict, total=False):
    """Negative prompt, size, and how the video is computed.

    Args:
        negative_prompt: Text that guidance steers away from; used only if `cfg_scale` is not 1.
        prompt_weighting: Whether brackets in prompts are weights of words: `(word:1.4)` raises what a word adds to the
            text encoder's result, `(word:0.7)` lowers it, `(word)` is 1.1; `\\(` is a bracket of the text.
        height, width: Size of the video in pixels, at least 1 and at most 32768; rounded up to a multiple of 16, or of
            32 with the autoencoder of Wan 2.2.
        num_frames: Number of frames of the video, at least 1 and at most 100000; rounded up to 4n + 1.
        resize_mode: How images and frames of another aspect ratio than the video are scaled to its size: "stretch"
            changes their proportions, as DiffSynth-Studio does; "crop" scales to cover it and cuts off what is outside;
            "pad" scales to fit into it and adds black.
        rand_device: Device on which the initial noise is generated; "cpu" gives the same noise on every machine.
        sigma_shift: Shift of the noise schedule, above 0 and at most 1000; larger values spend more steps at high noise
            levels.
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
    prompt_weighting: bool
    height: int
    width: int
    num_frames: int
    resize_mode: ResizeMode
    rand_device: RandDevice
    sigma_shift: float
    denoising_strength: float
    tiled: bool
    tile_size: tuple[int, int]
    tile_stride: tuple[int, int]
    sliding_window_size: int | None
    sliding_window_stride: int | None
    switch_DiT_boundary: float
    cfg_merge: bool


class WanArguments(
    ShapeArguments,
    VideoArguments,
    ImageArguments,
    ControlArguments,
    CameraArguments,
    SpeedArguments,
    VaceArguments,
    AnimateArguments,
    Animate2Arguments,
    LoopKeywords,
    total=False,
):
    """All arguments of a call except the prompt."""


_MODEL = "this version does not run {}"

OTHER_ARGUMENTS = {
    **dict.fromkeys(
        ("tea_cache_l1_thresh", "tea_cache_model_id"),
        "step_cache='tea:threshold=0.2,model=wan2.1-t2v-14b' takes its place, with the threshold that it had",
    ),
    **dict.fromkeys(
        (
            *("input_audio", "audio_embeds", "audio_sample_rate", "s2v_pose_video", "s2v_pose_latents"),
            "motion_video",
        ),
        _MODEL.format("Wan2.2-S2V; input_image and a prompt make a video without sound"),
    ),
    **dict.fromkeys(
        ("vap_video", "vap_prompt", "negative_vap_prompt"),
        _MODEL.format("Video-As-Prompt; vace_video and vace_reference_image follow a video with VACE"),
    ),
    "longcat_video": _MODEL.format("LongCat-Video; input_image continues a video from its last frame"),
    **dict.fromkeys(
        (
            *("wantodance_music_path", "wantodance_reference_image", "wantodance_fps", "wantodance_keyframes"),
            *("wantodance_keyframes_mask", "framewise_decoding"),
        ),
        _MODEL.format("WanToDance; animate_pose_video moves a person with Wan2.2-Animate"),
    ),
    "vace_control_video": "vace_video takes its place; only the manual of DiffSynth-Studio has this name",
}
"""Argument of DiffSynth-Studio, or of its manual, that the pipeline does not take -> what takes its place."""
