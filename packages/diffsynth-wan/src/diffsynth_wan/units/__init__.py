"""Units of the Wan pipeline in the order they run; each module holds those of one kind of input."""

from __future__ import annotations

from diffsynth_wan.units.animate import (
    add_animate_motion,
    add_animate_prefix_frame,
    encode_animate_latents,
    mark_branches,
)
from diffsynth_wan.units.animate2 import (
    add_animate2_prefix_frame,
    add_reference_attention,
    cache_reference_video,
    encode_animate2_latents,
    encode_reference_image_embeds,
    encode_reference_prompt,
    encode_reference_video,
)
from diffsynth_wan.units.camera import add_camera_control
from diffsynth_wan.units.control import add_reference_image, add_speed_control, encode_control_video
from diffsynth_wan.units.image import (
    concat_condition_latents,
    encode_first_frame,
    encode_image_embeds,
    encode_image_latents,
)
from diffsynth_wan.units.latents import (
    decode_video,
    encode_input_video,
    generate_noise,
    initial_latents,
    schedule,
    set_boundary,
)
from diffsynth_wan.units.prompt import encode_prompt, merge_branches
from diffsynth_wan.units.shape import round_shape, set_sliding_window, set_video_shape
from diffsynth_wan.units.vace import encode_vace_condition, encode_vace_references

UNITS = (
    round_shape,
    set_video_shape,
    schedule,
    set_boundary,
    merge_branches,
    encode_prompt,
    encode_reference_prompt,
    encode_input_video,
    encode_image_embeds,
    encode_reference_image_embeds,
    encode_animate_latents,
    encode_animate2_latents,
    encode_reference_video,
    encode_image_latents,
    encode_first_frame,
    encode_control_video,
    concat_condition_latents,
    add_reference_image,
    add_camera_control,
    add_speed_control,
    mark_branches,
    add_animate_motion,
    encode_vace_references,
    encode_vace_condition,
    add_animate2_prefix_frame,
    generate_noise,
    add_animate_prefix_frame,
    set_sliding_window,
    cache_reference_video,
    add_reference_attention,
    initial_latents,
)

OUTPUT_UNITS = (decode_video,)
