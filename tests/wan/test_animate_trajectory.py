"""Animate: whole trajectories equal those of diffusers' pipeline with the same tiny networks."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from diffusers import WanAnimatePipeline
from PIL import Image

from diffsynth_wan import WanVideoPipeline
from diffsynth_wan.features.animate import encode_animate_latents
from diffsynth_wan.features.image import encode_image_latents
from diffsynth_wan.units.prompt import encode_prompt
from diffsynth_wan.units.shape import VideoShape
from parity import TOLERANCE, relative_error
from wan_oracles import IMAGE_DIM, noise, oracle_animate_dit, our_animate, shared_parts

SIZE = {"height": 32, "width": 48}
CALL = {"num_inference_steps": 3, **SIZE}
FRAMES = 5
"""Number of frames of the result; the character's image takes four more."""


class SeenImage(torch.nn.Module):
    """An image encoder that returns a constant."""

    def __init__(self, embeds):
        super().__init__()
        self.embeds = embeds

    def forward(self, image):
        return self.embeds


@pytest.fixture(scope="module")
def pipelines():
    theirs, ours = shared_parts()
    dit = oracle_animate_dit()
    oracle = WanAnimatePipeline(**theirs, transformer=dit, image_encoder=None, image_processor=None)
    oracle.set_progress_bar_config(disable=True)
    oracle.check_inputs = lambda *given: None  # it refuses an image together with its embedding, but needs both
    network, adapter = our_animate(dit)
    embeds = torch.randn(1, 257, IMAGE_DIM, generator=torch.Generator().manual_seed(0))
    pipe = WanVideoPipeline.from_components(
        **ours,
        dit=network,
        animate_adapter=adapter,
        image_encoder=SeenImage(embeds),
        device="cpu",
        torch_dtype=torch.float32,
    )
    return pipe, oracle


def clip_of(seed, height=32, width=48):
    pixels = np.random.default_rng(seed).integers(0, 255, (FRAMES, height, width, 3), dtype=np.uint8)
    return [Image.fromarray(frame) for frame in pixels]


@torch.no_grad()
def test_a_scene_that_is_not_given_is_encoded_without_the_character(pipelines):
    """DiffSynth-Studio encodes the image and grey frames as one video, as it does for image to video."""
    vae = pipelines[0].vae
    place = {"device": torch.device("cpu"), "dtype": torch.float32}
    sizes = {"num_frames": FRAMES + 4, "vae_factor": 8, "time_factor": 4, **SIZE}
    shape = VideoShape(**sizes, resize_mode="stretch", tiling={"tiled": False}, **place)
    image, pose = clip_of(0)[0], clip_of(1)
    found = encode_animate_latents.function(vae, input_image=image, animate_pose_video=pose, video_shape=shape)
    channels = {"in_channels": 36, "latent_channels": 16, "frame_times": False}
    together = encode_image_latents.function(vae, input_image=image, video_shape=shape, **channels)
    assert torch.equal(found[:, :, 0], together[:, :, 0])
    assert relative_error(together[:, :, 1:], found[:, :, 1:]) == pytest.approx(0.89, abs=0.03)


def mask():
    half = np.zeros((FRAMES, 32, 48), dtype=np.uint8)
    half[:2, :, 24:] = half[2:, 16:] = 255
    return [Image.fromarray(frame) for frame in half]


def texts(ours):
    return [
        encode_prompt(ours.text_encoder, ours.tokenizer, prompt=[text], device=ours.device)
        for text in ("a man", "blurry")
    ]


@pytest.mark.parametrize(("replaces", "cfg_scale"), [(False, 1.0), (True, 3.0)])
@torch.no_grad()
def test_animate(pipelines, replaces, cfg_scale):
    """The unconditional branch of guidance gets a black face."""
    ours, oracle = pipelines
    image, pose, face = clip_of(0)[0], clip_of(1), clip_of(2, 512, 512)
    scene = {"background_video": clip_of(3), "mask_video": mask()} if replaces else {}
    embeds, negative = texts(ours)
    expected = oracle(
        image=image,
        pose_video=pose,
        face_video=face,
        **scene,
        **CALL,
        mode="replace" if replaces else "animate",
        segment_frame_length=FRAMES,
        prompt_embeds=embeds,
        negative_prompt_embeds=negative,
        image_embeds=ours.image_encoder.embeds,
        guidance_scale=cfg_scale,
        latents=noise(7, FRAMES + 4, 32, 48),
        output_type="latent",
    ).frames
    config = oracle.vae.config
    mean, std = (torch.tensor(each).view(1, -1, 1, 1, 1) for each in (config.latents_mean, config.latents_std))
    arguments = {
        "prompt": "a man",
        "negative_prompt": "blurry",
        "input_image": image,
        "animate_pose_video": pose,
        "animate_face_video": face,
        "num_frames": FRAMES + 4,
        "cfg_scale": cfg_scale,
        "seed": 7,
        **CALL,
    }
    if replaces:
        arguments |= {"animate_inpaint_video": scene["background_video"], "animate_mask_video": scene["mask_video"]}
    latents = ours(**arguments, output_type="latents")
    assert relative_error(latents, (expected - mean) / std) < TOLERANCE
    if not replaces:
        assert len(ours(**arguments | {"num_inference_steps": 1})) == FRAMES


def test_refused(pipelines):
    ours, _ = pipelines
    clip = clip_of(1)
    call = {**SIZE, "input_image": clip[0], "num_frames": 9}
    with pytest.raises(ValueError, match="pass animate_pose_video and animate_face_video"):
        ours("a man", **call)
    moved = call | {"animate_pose_video": clip, "animate_face_video": clip}
    with pytest.raises(ValueError, match="animate_inpaint_video and animate_mask_video"):
        ours("a man", **moved, animate_inpaint_video=clip)
    scene = {"animate_inpaint_video": clip, "animate_mask_video": [*clip, clip[0]]}
    with pytest.raises(ValueError, match="animate_mask_video has 6 frames, animate_inpaint_video 5; expected one mask"):
        ours("a man", **moved, **scene)
    with pytest.raises(ValueError, match="animate_face_video has 4 frames, the video needs 5"):
        ours("a man", **moved | {"animate_face_video": clip[:4]})
    with pytest.raises(ValueError, match="num_frames=1: expected at least 5"):
        ours("a man", **moved | {"num_frames": 1})
