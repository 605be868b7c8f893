"""The `TypedDict` of the arguments equals the arguments of the pipeline's units."""

import inspect

from diffsynth_wan import WanVideoPipeline
from diffsynth_wan.arguments import WanArguments


def test_typed_dict_equals_the_signature():
    parameters = inspect.signature(WanVideoPipeline.__call__).parameters
    assert set(WanArguments.__annotations__) == set(parameters) - {"self", "prompt"}


def test_types_equal_those_of_the_units():
    parameters = inspect.signature(WanVideoPipeline.__call__).parameters
    typed = {name: getattr(kind, "__forward_arg__", kind) for name, kind in WanArguments.__annotations__.items()}
    assert typed == {name: parameters[name].annotation for name in typed}


def test_names_and_defaults_of_the_reference():
    """`spec/features.md` A4: names and defaults that existing scripts rely on."""
    parameters = inspect.signature(WanVideoPipeline.__call__).parameters
    expected = {
        "prompt": "",
        "negative_prompt": "",
        "input_image": None,
        "end_image": None,
        "input_video": None,
        "denoising_strength": 1.0,
        "control_video": None,
        "reference_image": None,
        "camera_control_direction": None,
        "camera_control_speed": 1 / 54,
        "camera_control_origin": (0, 0.532139961, 0.946026558, 0.5, 0.5, 0, 0, 1, 0, 0, 0, 0, 1, 0, 0, 0, 0, 1, 0),
        "vace_video": None,
        "vace_video_mask": None,
        "vace_reference_image": None,
        "vace_scale": 1.0,
        "animate2_prompt_ref": " ",
        "animate2_reference_image": None,
        "animate2_reference_video": None,
        "animate2_refert_images": None,
        "animate2_offload_kv": False,
        "animate2_log_scale": 0.0,
        "seed": None,
        "rand_device": "cpu",
        "height": 480,
        "width": 832,
        "num_frames": 81,
        "cfg_scale": 5.0,
        "cfg_merge": False,
        "switch_DiT_boundary": 0.875,
        "num_inference_steps": 50,
        "sigma_shift": 5.0,
        "motion_bucket_id": None,
        "tiled": True,
        "tile_size": (30, 52),
        "tile_stride": (15, 26),
        "sliding_window_size": None,
        "sliding_window_stride": None,
    }
    assert {name: parameters[name].default for name in expected} == expected
    assert callable(parameters["progress_bar_cmd"].default)


def test_from_pretrained_names():
    names = list(inspect.signature(WanVideoPipeline.from_pretrained).parameters)
    assert names[:4] == ["torch_dtype", "device", "model_configs", "vram_limit"]
    assert {"redirect_common_files", "use_usp"} <= set(names)
