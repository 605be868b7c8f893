"""Names that other programs have for arguments of a call, for the message about an unknown one. Imports no torch.

They are not accepted in place of our names: the error says the name that is meant. What a pipeline itself says about an
argument, in `other_arguments`, has precedence.
"""

from __future__ import annotations

from collections.abc import Iterable

from diffsynth.errors import did_you_mean

SYNONYMS = {
    **dict.fromkeys(("cfg", "guidance_scale", "true_cfg_scale", "cfg_strength", "cfg_weight"), ("cfg_scale",)),
    **dict.fromkeys(
        ("steps", "num_steps", "n_steps", "inference_steps", "sampling_steps", "sample_steps", "ddim_steps"),
        ("num_inference_steps",),
    ),
    **dict.fromkeys(("negative", "neg", "neg_prompt", "n_prompt", "uncond_prompt"), ("negative_prompt",)),
    **dict.fromkeys(
        ("sampler", "sampler_name", "sampling_method", "sample_solver", "scheduler", "scheduler_name"), ("solver",)
    ),
    **dict.fromkeys(("frames", "num_frame", "frame_num", "video_length", "n_frames"), ("num_frames",)),
    **dict.fromkeys(
        (
            *("n", "n_samples", "num_samples", "batch", "batch_size", "batch_count", "n_iter", "num_results"),
            *("num_outputs", "num_images_per_prompt", "num_videos_per_prompt", "images_per_prompt"),
        ),
        ("num_images",),
    ),
    **dict.fromkeys(("strength", "denoise", "denoise_strength", "img2img_strength"), ("denoising_strength",)),
    **dict.fromkeys(("image", "images", "init_image", "img", "source_image"), ("input_image", "edit_image")),
    **dict.fromkeys(("video", "init_video", "source_video"), ("input_video",)),
    **dict.fromkeys(("last_image", "end_frame"), ("end_image",)),
    **dict.fromkeys(("mask", "mask_image", "image_mask"), ("inpaint_mask",)),
    **dict.fromkeys(("shift", "flow_shift", "time_shift", "timestep_shift", "sample_shift"), ("sigma_shift",)),
    **dict.fromkeys(("generator", "random_seed", "noise_seed", "base_seed", "manual_seed"), ("seed",)),
    **dict.fromkeys(("text", "caption", "positive", "positive_prompt"), ("prompt",)),
    **dict.fromkeys(("callback", "callback_on_step_end", "step_callback"), ("on_step",)),
    **dict.fromkeys(("w", "image_width"), ("width",)),
    **dict.fromkeys(("h", "image_height"), ("height",)),
    **dict.fromkeys(("size", "resolution", "image_size"), ("height", "width")),
    **dict.fromkeys(("tile", "tiling", "vae_tiling", "tiled_vae"), ("tiled",)),
}
"""Name in other programs -> the names that may be meant, of which a pipeline may have some."""


def meant(name: str, known: Iterable[str]) -> list[str]:
    """Return a list of the arguments that are meant by a name of other programs; empty for a name of none.

    Args:
        name: as the caller gave it; case is ignored, and a hyphen is an underscore.
        known: the arguments that there are.
    """
    names = set(known)
    return [each for each in SYNONYMS.get(name.lower().replace("-", "_"), ()) if each in names]


def which_is_meant(name: str, known: Iterable[str]) -> str:
    """Return `"; did you mean 'cfg_scale'?"` for a name of other programs, or with the nearest spelling for any other
    one; "" if none is near.

    Args:
        name: of an unknown argument.
        known: the arguments that there are.
    """
    names = list(known)
    if found := meant(name, names):
        return f"; did you mean {' and '.join(map(repr, found))}?"
    return did_you_mean(name, names)
