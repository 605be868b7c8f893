"""The steps of the Wan pipeline, in the order they run; each group of arguments is a module of its own."""

from __future__ import annotations

from diffsynth_wan.units.animate import encode_character, lead_with_character, move_character, tell_branches
from diffsynth_wan.units.animate2 import (
    encode_cast,
    encode_reference,
    encode_reference_prompt,
    follow_reference,
    lead_with_cast,
    read_reference,
    see_reference,
)
from diffsynth_wan.units.control import control_speed, encode_control, move_camera, place_reference
from diffsynth_wan.units.experts import set_boundary
from diffsynth_wan.units.image import encode_first_frame, encode_images, encode_with_clip, join_conditions
from diffsynth_wan.units.latents import decode_video, draw_noise, encode_video, initial_latents, schedule
from diffsynth_wan.units.prompt import encode_prompt, merge_branches
from diffsynth_wan.units.shape import round_shape, slide_window, stretch_canvas
from diffsynth_wan.units.vace import encode_references, encode_vace

UNITS = (
    round_shape,
    stretch_canvas,
    schedule,
    set_boundary,
    merge_branches,
    encode_prompt,
    encode_reference_prompt,
    encode_video,
    encode_with_clip,
    see_reference,
    encode_character,
    encode_cast,
    encode_reference,
    encode_images,
    encode_first_frame,
    encode_control,
    join_conditions,
    place_reference,
    move_camera,
    control_speed,
    tell_branches,
    move_character,
    encode_references,
    encode_vace,
    lead_with_cast,
    draw_noise,
    lead_with_character,
    slide_window,
    read_reference,
    follow_reference,
    initial_latents,
)

OUTPUT_UNITS = (decode_video,)
