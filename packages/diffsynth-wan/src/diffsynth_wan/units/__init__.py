"""Units of every call of the Wan pipeline; those of one conditioning are in `diffsynth_wan.features`."""

from __future__ import annotations

from diffsynth_wan.units.latents import decode_video, generate_noise, initial_latents, schedule, set_boundary
from diffsynth_wan.units.prompt import encode_prompt, mark_branches, merge_branches
from diffsynth_wan.units.shape import round_shape, set_sliding_window, set_tiling, set_video_shape

UNITS = (
    round_shape,
    set_tiling,
    set_video_shape,
    schedule,
    set_boundary,
    merge_branches,
    mark_branches,
    encode_prompt,
    generate_noise,
    initial_latents,
    set_sliding_window,
)

OUTPUT_UNITS = (decode_video,)
