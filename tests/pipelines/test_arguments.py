"""Every argument of the calls of existing scripts is taken, or its error says what takes its place."""

from __future__ import annotations

import re

import pytest

import diffsynth
from diffsynth.runtime.request import reject_unknown
from diffsynth.spec import resolve

ARGUMENTS = {
    "diffsynth_flux:FluxImagePipeline": """
        prompt negative_prompt cfg_scale embedded_guidance t5_sequence_length input_image denoising_strength
        height width seed rand_device sigma_shift num_inference_steps kontext_images controlnet_inputs
        ipadapter_images ipadapter_scale eligen_entity_prompts eligen_entity_masks eligen_enable_on_negative
        eligen_enable_inpaint infinityou_id_image infinityou_guidance flex_inpaint_image flex_inpaint_mask
        flex_control_image flex_control_strength flex_control_stop value_controller_inputs step1x_reference_image
        nexus_gen_reference_image lora_encoder_inputs lora_encoder_scale flux_fill_image flux_fill_mask
        flux_redux_image insert_anything_source_image insert_anything_source_mask insert_anything_ref_image
        insert_anything_ref_mask tea_cache_l1_thresh tiled tile_size tile_stride progress_bar_cmd
    """,
    "diffsynth_flux:Flux2ImagePipeline": """
        prompt negative_prompt cfg_scale embedded_guidance input_image denoising_strength edit_image
        edit_image_auto_resize height width seed rand_device initial_noise num_inference_steps kv_cache
        negative_kv_cache lora negative_lora extra_text_embedding negative_extra_text_embedding inpaint_mask
        inpaint_blur_size inpaint_blur_sigma progress_bar_cmd t5_sequence_length tiled tile_size tile_stride
    """,
    "diffsynth_qwen_image:QwenImagePipeline": """
        prompt negative_prompt cfg_scale input_image denoising_strength inpaint_mask inpaint_blur_size
        inpaint_blur_sigma height width seed rand_device num_inference_steps exponential_shift_mu
        blockwise_controlnet_inputs eligen_entity_prompts eligen_entity_masks eligen_enable_on_negative
        edit_image edit_image_auto_resize edit_rope_interpolation zero_cond_t kv_cache negative_kv_cache
        layer_input_image layer_num context_image tiled tile_size tile_stride progress_bar_cmd
        enable_fp8_attention
    """,
    "diffsynth_zimage:ZImagePipeline": """
        prompt negative_prompt cfg_scale input_image denoising_strength edit_image edit_image_auto_resize height
        width seed rand_device num_inference_steps sigma_shift controlnet_inputs image2lora_images
        positive_only_lora lora negative_lora progress_bar_cmd
    """,
    "diffsynth_wan:WanVideoPipeline": """
        prompt negative_prompt input_image end_image input_video denoising_strength input_audio audio_embeds
        audio_sample_rate s2v_pose_video s2v_pose_latents motion_video control_video reference_image
        camera_control_direction camera_control_speed camera_control_origin vace_video vace_video_mask
        vace_reference_image vace_scale animate_pose_video animate_face_video animate_inpaint_video
        animate_mask_video animate2_prompt_ref animate2_reference_image animate2_reference_video
        animate2_refert_images animate2_offload_kv animate2_log_scale vap_video vap_prompt negative_vap_prompt
        seed rand_device height width num_frames cfg_scale cfg_merge switch_DiT_boundary num_inference_steps
        sigma_shift motion_bucket_id longcat_video tiled tile_size tile_stride sliding_window_size
        sliding_window_stride tea_cache_l1_thresh tea_cache_model_id wantodance_music_path
        wantodance_reference_image wantodance_fps wantodance_keyframes wantodance_keyframes_mask
        framewise_decoding output_type progress_bar_cmd vace_control_video control_camera_video
    """,
}
"""Pipeline -> its arguments in DiffSynth-Studio's code, and those that only its manual has (`spec/features.md`, A4)."""


def test_every_family_is_listed():
    families = {record.pipeline.partition(".")[0].partition(":")[0] for record in diffsynth.registry.list()}
    assert {name.partition(":")[0] for name in ARGUMENTS} == families


@pytest.mark.parametrize("name", ARGUMENTS)
def test_every_argument_is_taken_or_says_what_takes_its_place(name):
    pipeline = resolve(name)
    signature = pipeline.call_signature({})
    for argument in ARGUMENTS[name].split():
        if argument in signature.parameters:
            continue
        with pytest.raises(TypeError, match=f"unknown argument '{argument}': ") as caught:
            reject_unknown([argument], signature, pipeline.other_arguments)
        # An argument that the error names in its place is one.
        for named in re.findall(r"\b([a-z_0-9]+)(?:=\S+)? takes? its place", str(caught.value)):
            assert named in signature.parameters, f"{argument}: {named} is no argument either"


@pytest.mark.parametrize("name", ARGUMENTS)
def test_no_argument_that_is_taken_is_refused(name):
    pipeline = resolve(name)
    assert set(pipeline.other_arguments).isdisjoint(pipeline.call_signature({}).parameters)
