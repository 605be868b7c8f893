"""Whole trajectories equal those of diffusers' pipelines with the same tiny networks."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from diffusers import WanImageToVideoPipeline, WanVACEPipeline
from diffusers import WanPipeline as OraclePipeline
from PIL import Image

from diffsynth_wan import WanVideoPipeline
from parity import TOLERANCE, relative_error
from wan_oracles import (
    IMAGE_DIM,
    noise,
    oracle_dit,
    oracle_vace_dit,
    oracle_vae_22,
    our_dit,
    our_vace,
    our_vae_22,
    shared_parts,
)

SIZE = {"height": 48, "width": 64, "num_frames": 9}
CALL = {"prompt": "a red apple on a table", "negative_prompt": "blurry", "num_inference_steps": 3, **SIZE}


@pytest.fixture(scope="module")
def parts():
    return shared_parts()


def ours_with(parts, **networks) -> WanVideoPipeline:
    return WanVideoPipeline.from_components(**parts[1], **networks, device="cpu", torch_dtype=torch.float32)


def oracle_with(parts, cls=OraclePipeline, **rest):
    oracle = cls(**parts[0], **rest)
    oracle.set_progress_bar_config(disable=True)
    return oracle


@pytest.fixture(scope="module")
def embedded(text_to_video):
    """Return arguments of an oracle with encoded prompts: image-to-video pipelines cannot encode without ftfy."""
    _, oracle = text_to_video
    texts = oracle.encode_prompt(CALL["prompt"], CALL["negative_prompt"], max_sequence_length=512)
    names = ("prompt_embeds", "negative_prompt_embeds")
    return {name: value for name, value in CALL.items() if "prompt" not in name} | dict(zip(names, texts, strict=True))


@pytest.fixture(scope="module")
def text_to_video(parts):
    dit = oracle_dit()
    return ours_with(parts, dit=our_dit(dit)), oracle_with(parts, transformer=dit)


@pytest.mark.parametrize("cfg_scale", [1.0, 5.0])
def test_text_to_video(text_to_video, cfg_scale):
    ours, oracle = text_to_video
    expected = oracle(**CALL, guidance_scale=cfg_scale, latents=noise(7, 9, 48, 64), output_type="latent").frames
    latents = ours(**CALL, cfg_scale=cfg_scale, seed=7, output_type="latents")
    assert relative_error(latents, expected) < TOLERANCE
    if cfg_scale > 1:
        unguided = ours(**CALL, cfg_scale=1.0, seed=7, output_type="latents")
        assert relative_error(unguided, expected) > 1e-2


def test_frames(text_to_video):
    ours, oracle = text_to_video
    expected = oracle(**CALL, guidance_scale=5.0, latents=noise(3, 9, 48, 64), output_type="pil").frames[0]
    frames = ours(**CALL, seed=3)
    assert len(frames) == len(expected) == 9
    for frame, truth in zip(frames, expected, strict=True):
        assert frame.size == (64, 48)
        assert np.abs(np.asarray(frame, int) - np.asarray(truth, int)).max() <= 1


def test_video_to_video(text_to_video):
    """Strength 0.5 with 3 steps has the noise levels of the second half of diffusers' 6 steps."""
    ours, oracle = text_to_video
    clip = clip_of(0, 11)
    with torch.no_grad():
        pixels = np.stack([np.asarray(frame) for frame in clip[:9]])
        start = torch.from_numpy(pixels).permute(3, 0, 1, 2)[None].float() / 127.5 - 1
        clean = scaled(oracle.vae, oracle.vae.encode(start).latent_dist.mode())
    sigma = 5 * 0.5 / (1 + 4 * 0.5)
    noised = (1 - sigma) * clean + sigma * noise(5, 9, 48, 64)
    expected = second_half(oracle, noised)
    latents = ours(**CALL, input_video=clip, denoising_strength=0.5, cfg_scale=1.0, seed=5, output_type="latents")
    assert relative_error(latents, expected) < TOLERANCE
    assert relative_error(latents, clean) > 1e-2


@torch.no_grad()
def second_half(oracle, latents):
    oracle.scheduler.set_timesteps(6)
    oracle.scheduler.set_begin_index(3)
    embeds, _ = oracle.encode_prompt(CALL["prompt"], None, False, max_sequence_length=512)
    for time in oracle.scheduler.timesteps[3:]:
        velocity = oracle.transformer(latents, time[None], embeds, return_dict=False)[0]
        latents = oracle.scheduler.step(velocity, time, latents, return_dict=False)[0]
    return latents


def scaled(vae, latents):
    mean, std = (
        torch.tensor(each)[None, :, None, None, None] for each in (vae.config.latents_mean, vae.config.latents_std)
    )
    return (latents - mean) / std


def clip_of(seed, frames):
    pixels = np.random.default_rng(seed).integers(0, 255, (frames, 48, 64, 3), dtype=np.uint8)
    return [Image.fromarray(frame) for frame in pixels]


@pytest.fixture(scope="module")
def images():
    return clip_of(1, 2)


class SeenImages(torch.nn.Module):
    """An image encoder that returns constants."""

    def __init__(self, embeds):
        super().__init__()
        self.embeds = list(embeds)
        self.seen = 0

    def forward(self, image):
        self.seen += 1
        return self.embeds[(self.seen - 1) % len(self.embeds)]


@pytest.mark.parametrize("both_ends", [False, True])
def test_image_to_video_with_an_image_branch(parts, images, embedded, both_ends):
    """Wan 2.1: mask and encoded image as condition latents, CLIP's hidden states in the cross-attention."""
    dit = oracle_dit(
        in_channels=36, image_dim=IMAGE_DIM, added_kv_proj_dim=256, pos_embed_seq_len=514 if both_ends else None
    )
    oracle = oracle_with(parts, WanImageToVideoPipeline, transformer=dit, image_encoder=None, image_processor=None)
    oracle.check_inputs = lambda *given: None  # it refuses an image together with its embedding, but needs both
    embeds = [torch.randn(1, 257, IMAGE_DIM, generator=torch.Generator().manual_seed(seed)) for seed in (0, 1)]
    ours = ours_with(parts, dit=our_dit(dit), image_encoder=SeenImages(embeds))
    last = images[1] if both_ends else None
    given = torch.cat(embeds) if both_ends else embeds[0]
    expected = oracle(
        **embedded,
        image=images[0],
        last_image=last,
        image_embeds=given,
        guidance_scale=5.0,
        latents=noise(7, 9, 48, 64),
        output_type="latent",
    ).frames
    latents = ours(**CALL, input_image=images[0], end_image=last, seed=7, output_type="latents")
    assert relative_error(latents, expected) < TOLERANCE


def test_tokens_of_the_last_image_are_no_text(parts, images):
    """DiffSynth-Studio splits 257 tokens off the context, and reads those of the last image by the text's weights."""
    dit = our_dit(oracle_dit(in_channels=36, image_dim=IMAGE_DIM, added_kv_proj_dim=256, pos_embed_seq_len=514))
    embeds = [torch.randn(1, 257, IMAGE_DIM, generator=torch.Generator().manual_seed(seed)) for seed in (0, 1)]
    ours = ours_with(parts, dit=dit, image_encoder=SeenImages(embeds))
    call = CALL | {"input_image": images[0], "end_image": images[1], "seed": 7, "output_type": "latents"}
    latents = ours(**call)

    def split(module, arguments):
        x, text, image = arguments
        return x, torch.cat([image[:, 257:], text], dim=1), image[:, :257]

    for block in dit.blocks:
        block.cross_attn.register_forward_pre_hook(split)
    assert relative_error(ours(**call), latents) == pytest.approx(0.134, abs=0.01)


@pytest.mark.parametrize("boundary", [0.9, 0.5])
def test_two_experts(parts, boundary):
    """Noise levels are 1, 0.909 and 0.714; boundaries before the last one, and below all."""
    high, low = oracle_dit(0), oracle_dit(1)
    oracle = oracle_with(parts, transformer=high, transformer_2=low, boundary_ratio=boundary)
    ours = ours_with(parts, dit=our_dit(high), dit2=our_dit(low))
    expected = oracle(**CALL, guidance_scale=4.0, latents=noise(7, 9, 48, 64), output_type="latent").frames
    latents = ours(**CALL, cfg_scale=4.0, seed=7, switch_DiT_boundary=boundary, output_type="latents")
    assert relative_error(latents, expected) < TOLERANCE
    swapped = ours(**CALL, cfg_scale=4.0, seed=7, switch_DiT_boundary=0.7, output_type="latents")
    assert (relative_error(latents, swapped) > 1e-3) == (boundary == 0.9)


def test_image_to_video_with_two_experts(parts, images, embedded):
    """Wan 2.2: no image branch."""
    high, low = oracle_dit(0, in_channels=36), oracle_dit(1, in_channels=36)
    oracle = oracle_with(
        parts,
        WanImageToVideoPipeline,
        transformer=high,
        transformer_2=low,
        boundary_ratio=0.9,
        image_encoder=None,
        image_processor=None,
    )
    ours = ours_with(parts, dit=our_dit(high), dit2=our_dit(low))
    expected = oracle(
        **embedded, image=images[0], guidance_scale=3.5, latents=noise(7, 9, 48, 64), output_type="latent"
    ).frames
    latents = ours(**CALL, input_image=images[0], cfg_scale=3.5, seed=7, switch_DiT_boundary=0.9, output_type="latents")
    assert relative_error(latents, expected) < TOLERANCE


def masks(frames):
    """Half of the image, the other half at the end."""
    half = np.zeros((frames, 48, 64, 3), dtype=np.uint8)
    half[: frames // 2, :, 32:] = half[frames // 2 :, 24:] = 255
    return [Image.fromarray(frame) for frame in half]


@pytest.mark.parametrize("given", ["video", "video and mask", "reference", "everything"])
def test_vace(parts, images, embedded, given):
    dit = oracle_vace_dit()
    oracle = oracle_with(parts, WanVACEPipeline, transformer=dit)
    network, vace = our_vace(dit)
    ours = ours_with(parts, dit=network, vace=vace)
    video = clip_of(2, 9) if given != "reference" else None
    mask = masks(9) if given in ("video and mask", "everything") else None
    reference = images[0] if given in ("reference", "everything") else None
    frames = 9 if reference is None else 13
    drawn = noise(7, frames, 48, 64)
    expected = oracle(
        **embedded,
        video=video,
        mask=mask,
        reference_images=reference,
        conditioning_scale=0.7,
        guidance_scale=5.0,
        # We generate the noise of references last, as DiffSynth-Studio does, and diffusers first.
        latents=drawn if reference is None else drawn.roll(1, dims=2),
        output_type="latent",
    ).frames
    arguments = {"vace_video": video, "vace_video_mask": mask, "vace_reference_image": reference}
    latents = ours(**CALL, **arguments, vace_scale=0.7, seed=7, output_type="latents")
    assert relative_error(latents, expected) < TOLERANCE
    assert len(ours(**CALL | {"num_inference_steps": 1}, **arguments, seed=7)) == 9


def test_vace_of_two_experts(parts, embedded):
    high, low = oracle_vace_dit(0), oracle_vace_dit(1)
    oracle = oracle_with(parts, WanVACEPipeline, transformer=high, transformer_2=low, boundary_ratio=0.9)
    (dit, vace), (dit2, vace2) = our_vace(high), our_vace(low)
    ours = ours_with(parts, dit=dit, vace=vace, dit2=dit2, vace2=vace2)
    video = clip_of(2, 9)
    expected = oracle(
        **embedded, video=video, guidance_scale=5.0, latents=noise(7, 9, 48, 64), output_type="latent"
    ).frames
    latents = ours(**CALL, vace_video=video, seed=7, switch_DiT_boundary=0.9, output_type="latents")
    assert relative_error(latents, expected) < TOLERANCE


def test_a_step_cache_skips_no_block_of_vace(parts):
    """The results of its blocks were predicted like those of the network, and its hints were added twice."""
    network, vace = our_vace(oracle_vace_dit())
    ours = ours_with(parts, dit=network, vace=vace)
    entered, left, runs = [], [], []
    handles = [
        network.blocks[0].register_forward_pre_hook(lambda module, given: entered.append(given[0])),
        network.blocks[-1].register_forward_hook(lambda module, given, tokens: left.append(tokens)),
        vace.vace_blocks[-1].after_proj.register_forward_hook(lambda *_: runs.append(len(left))),
    ]
    call = CALL | {"num_inference_steps": 3, "cfg_scale": 1.0, "seed": 7, "output_type": "latents"}
    ours(**call, vace_video=clip_of(2, 9), step_cache="taylor:interval=10,order=0,warmup_steps=1")
    for handle in handles:
        handle.remove()
    assert runs == [0, 1, 2]
    changes = [after - before for before, after in zip(entered, left, strict=True)]
    assert relative_error(changes[1], changes[0]) < 1e-6
    assert relative_error(changes[2], changes[0]) > 1e-3


def test_vace_at_scale_zero_is_the_network_alone(parts):
    network, vace = our_vace(oracle_vace_dit())
    alone, ours = ours_with(parts, dit=network), ours_with(parts, dit=network, vace=vace)
    plain = alone(**CALL, seed=7, output_type="latents")
    assert torch.equal(ours(**CALL, seed=7, output_type="latents"), plain)
    scaled_to_zero = ours(**CALL, vace_video=clip_of(2, 9), vace_scale=0.0, seed=7, output_type="latents")
    assert relative_error(scaled_to_zero, plain) < 1e-6


@pytest.mark.parametrize("with_image", [False, True])
def test_frames_with_times_of_their_own(parts, images, embedded, with_image):
    """TI2V: the autoencoder of Wan 2.2, and an image as a first frame without noise."""
    dit, vae = oracle_dit(in_channels=48, out_channels=48), oracle_vae_22()
    theirs, ours = parts[0] | {"vae": vae}, parts[1] | {"vae": our_vae_22(vae)}
    frames = {"transformer": dit, "expand_timesteps": True}
    if with_image:
        oracle = oracle_with((theirs,), WanImageToVideoPipeline, image_encoder=None, image_processor=None, **frames)
    else:
        oracle = oracle_with((theirs,), **frames)
    size = {"height": 64, "width": 96}
    image = images[0].resize((96, 64))
    expected = oracle(
        **embedded | size,
        **({"image": image} if with_image else {}),
        guidance_scale=5.0,
        latents=noise(7, 9, 64, 96, channels=48, factor=16),
        output_type="latent",
    ).frames
    pipe = ours_with((theirs, ours), dit=our_dit(dit))
    latents = pipe(**CALL | size, input_image=image if with_image else None, seed=7, output_type="latents")
    assert relative_error(latents, expected) < TOLERANCE
    if not with_image:
        return
    # Noise that a solver adds, and guidance that projects, leave the image as it is, too.
    for change in ({"solver": "euler_ancestral"}, {"guidance": "apg"}):
        changed = pipe(**CALL | size, input_image=image, seed=7, output_type="latents", **change)
        assert relative_error(changed[:, :, :1], latents[:, :, :1]) < 1e-6
        assert relative_error(changed[:, :, 1:], latents[:, :, 1:]) > 1e-3


def test_a_batch_equals_single_calls(text_to_video):
    ours, _ = text_to_video
    prompts = ["a", "a much longer prompt about a red apple on a table near a window"]
    arguments = {"num_inference_steps": 2, "height": 32, "width": 32, "num_frames": 5, "output_type": "latents"}
    batch = ours(prompts, seed=[1, 2], **arguments)
    singles = torch.cat([ours(prompt, seed=seed, **arguments) for prompt, seed in zip(prompts, (1, 2), strict=True)])
    assert relative_error(batch, singles) < TOLERANCE
