"""Animate-2: trajectories of consecutive clips equal those of diffusers' pipeline with the same tiny networks."""

from __future__ import annotations

import functools

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from diffusers import WanAnimate2Transformer3DModel
from diffusers.guiders import ClassifierFreeGuidance
from diffusers.models.transformers import transformer_wan_animate_2
from diffusers.modular_pipelines.wan_animate_2 import denoise, encoders
from diffusers.modular_pipelines.wan_animate_2.modular_blocks_wan_animate_2 import WanAnimate2Blocks
from PIL import Image
from torch.nn.attention import flex_attention

from diffsynth_wan import WanVideoPipeline
from parity import TOLERANCE, relative_error
from wan_oracles import TEXT_DIM, drawn, noise, our_animate_2, shared_parts

HEIGHT, WIDTH, FRAMES = 32, 48, 5
CALL = {"height": HEIGHT, "width": WIDTH, "num_frames": FRAMES, "num_inference_steps": 3}
TEXTS = {"prompt": "a man on a beach", "negative_prompt": "blurry"}
LAYERS = 10
"""Number of blocks; guidance skips the tenth."""


class Eye(torch.nn.Module):
    """An image encoder with another output for every image."""

    dtype = torch.float32

    def __init__(self) -> None:
        super().__init__()
        table = torch.randn(48, 2 * 1280, generator=torch.Generator().manual_seed(3))
        self.table = torch.nn.Parameter(table, requires_grad=False)

    def forward(self, image):
        return (F.adaptive_avg_pool2d(image, 4).flatten() @ self.table).view(1, 2, 1280)


class Clips:
    """Return both pipelines and the oracle's results for two clips, of which the second continues the first."""

    def __init__(self, cfg_scale: float, monkeypatch: pytest.MonkeyPatch) -> None:
        theirs, ours = shared_parts()
        network = drawn(
            WanAnimate2Transformer3DModel(
                dim=256, ffn_dim=96, freq_dim=32, text_dim=TEXT_DIM, num_heads=2, num_layers=LAYERS
            ),
            seed=0,
        )
        eye = Eye()
        self.ours = WanVideoPipeline.from_components(
            **ours, dit=our_animate_2(network), image_encoder=eye, device="cpu", torch_dtype=torch.float32
        )
        # diffusers compiles FlexAttention and the function that builds its mask; both compute the same without.
        monkeypatch.setattr(flex_attention, "_FLEX_ATTENTION_DISABLE_COMPILE_DEBUG", True)
        made = functools.partial(transformer_wan_animate_2.create_block_mask)
        monkeypatch.setattr(
            transformer_wan_animate_2, "create_block_mask", lambda *given, _compile, **named: made(*given, **named)
        )
        # diffusers calls methods of its own CLIP; `Eye` has none of them.
        monkeypatch.setattr(encoders, "clip_visual_encode", lambda encoder, pixels, *rest: encoder(pixels))
        # Both draw FRAMES + 4 frames in one go, unchanged; ours from a seed for each clip, so the same is given here.
        noises = iter(noise(seed, FRAMES + 4, HEIGHT, WIDTH) for seed in (7, 8))
        monkeypatch.setattr(denoise, "randn_tensor", lambda *given, **named: next(noises)[0])
        self.latents: list[torch.Tensor] = []  # diffusers returns frames only; what it decodes is recorded
        decode = denoise.decode_vae
        monkeypatch.setattr(denoise, "decode_vae", lambda vae, x: self.latents.append(x[None]) or decode(vae, x))
        oracle = WanAnimate2Blocks().init_pipeline()
        oracle.update_components(
            **theirs, transformer=network, image_encoder=eye, guider=ClassifierFreeGuidance(guidance_scale=cfg_scale)
        )
        self.person, self.moves = clip_of(1, 1)[0], clip_of(2, 2 * FRAMES - 1)
        # A call of ours is one clip, as in DiffSynth-Studio, and its image encoder gets the first frame of that clip. A
        # call of diffusers makes all clips, and its image encoder gets the first frame of the first: so both are equal.
        self.moves[FRAMES - 1] = self.moves[0]
        self.frames = oracle(
            **TEXTS,
            prompt_ref="a dancer",
            image=self.person,
            driving_video=self.moves,
            segment_frame_length=FRAMES,
            height=HEIGHT,
            width=WIDTH,
            num_inference_steps=3,
            output_type="pt",
            output="videos",
        )
        self.arguments = {
            **(CALL | TEXTS),
            "animate2_prompt_ref": "a dancer",
            "animate2_reference_image": self.person,
            "cfg_scale": cfg_scale,
        }

    def first(self, **changed) -> torch.Tensor:
        arguments = self.arguments | {"animate2_reference_video": self.moves[:FRAMES], "seed": 7} | changed
        return self.ours(**arguments)

    def second(self, ending: torch.Tensor, **changed) -> torch.Tensor:
        moves = self.moves[FRAMES - 1 :]
        arguments = self.arguments | {"animate2_reference_video": moves, "seed": 8, "animate2_refert_images": ending}
        return self.ours(**arguments | changed)


def clip_of(seed: int, frames: int) -> list[Image.Image]:
    pixels = np.random.default_rng(seed).integers(0, 255, (frames, HEIGHT, WIDTH, 3), dtype=np.uint8)
    return [Image.fromarray(frame) for frame in pixels]


@pytest.fixture(scope="module")
def clips():
    with pytest.MonkeyPatch.context() as monkeypatch, torch.no_grad():
        yield Clips(3.0, monkeypatch)


def test_clip_after_clip(clips):
    """The unconditional pass of guidance has no prompt and skips the tenth block."""
    assert len(clips.latents) == 2
    steps = []
    watched = {"output_type": "tensor", "on_step": lambda step: steps.append(step.latents)}
    first = clips.first(**watched)
    assert relative_error(steps[2][:, :, 1:], clips.latents[0]) < TOLERANCE
    second = clips.second(first[:, :, -1:], **watched)
    assert relative_error(steps[5][:, :, 1:], clips.latents[1]) < TOLERANCE
    both = torch.cat([first, second[:, :, 1:]], dim=2)
    assert relative_error(both, 2 * clips.frames.transpose(1, 2) - 1) < TOLERANCE


def test_what_was_read_may_wait_on_the_cpu_and_one_window_is_the_whole(clips):
    one_step = {"num_inference_steps": 1, "output_type": "latents", "animate2_log_scale": -1.3}
    plain = clips.first(**one_step)
    assert torch.equal(clips.first(**one_step, animate2_offload_kv=True), plain)
    assert torch.equal(clips.first(**one_step, sliding_window_size=2, sliding_window_stride=1), plain)
    assert relative_error(clips.first(**one_step | {"animate2_log_scale": 0.0}), plain) > 1e-3


def test_one_reference_serves_several_videos(clips):
    one_step = {"num_inference_steps": 1, "output_type": "latents", "cfg_scale": 1.0}
    both = clips.first(**one_step, prompt=["a robot", TEXTS["prompt"]], seed=[9, 7])
    assert relative_error(both[1:], clips.first(**one_step)) < TOLERANCE
