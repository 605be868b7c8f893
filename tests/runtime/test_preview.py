"""Previews: what the autoencoder makes of averaged latents, and a call around them that does not change."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from torch.nn.functional import avg_pool2d

from diffsynth.core.vram.managed import managed
from diffsynth.core.vram.policy import BlockState
from diffsynth.errors import MissingComponent, NotFinite, PipelineError
from diffsynth.runtime.images import tensor_to_images
from diffsynth.runtime.unit import unit
from diffsynth_qwen_image import QwenImagePipeline
from diffsynth_wan import WanVideoPipeline
from diffsynth_zimage import ZImagePipeline
from tiny_z_image import tiny_z_image
from toy_pipeline import ToyNet, ToyPipeline, toy_pipeline
from wan_oracles import oracle_vae, our_vae

CALL = {"prompt": "a fox", "height": 32, "width": 48, "num_inference_steps": 3, "seed": 0}


@pytest.fixture(scope="module")
def pipe():
    return tiny_z_image(with_autoencoder=True)


@pytest.fixture(scope="module")
def video_autoencoder():
    return our_vae(oracle_vae())


def under(policy):
    """Return a pipeline whose components are under a policy."""
    parts = tiny_z_image(with_autoencoder=True).components
    for part in parts.values():
        if isinstance(part, torch.nn.Module):
            part.requires_grad_(False)
    return ZImagePipeline(parts, device="cpu", torch_dtype=torch.float32, policy=policy)


def same(images, others):
    return len(images) == len(others) and all(map(np.array_equal, map(np.asarray, images), map(np.asarray, others)))


def test_a_preview_of_small_latents_is_the_image_of_the_call(pipe):
    latents = pipe(**CALL, output_type="latents")
    assert same([pipe.decode_preview(latents)], [pipe(**CALL)])
    assert same([pipe.decode_preview(latents.double())], [pipe(**CALL)])


def test_larger_latents_are_averaged_in_their_proportions(pipe):
    latents = torch.randn(2, 16, 8, 12, generator=torch.Generator().manual_seed(0))
    previews = pipe.decode_preview(latents, max_size=6)
    factor = pipe.vae.config.factor
    assert [image.size for image in previews] == [(6 * factor, 4 * factor)] * 2
    with torch.no_grad():
        assert same(previews, tensor_to_images(pipe.vae.decode(avg_pool2d(latents, 2))))
    assert pipe.decode_preview(latents[:1], max_size=1).size == (factor, factor)


def test_frames_of_a_video_are_chosen_evenly(video_autoencoder):
    pipe = WanVideoPipeline.from_components(vae=video_autoencoder, device="cpu", torch_dtype=torch.float32)
    latents = torch.randn(1, 16, 5, 2, 4, generator=torch.Generator().manual_seed(0))
    frames = pipe.decode_preview(latents, max_size=2, max_frames=3)
    small = avg_pool2d(latents[0, :, [0, 2, 4]], 2)[None]
    with torch.no_grad():
        expected = tensor_to_images(video_autoencoder.decode(small)[0].transpose(0, 1))
    assert len(frames) == 1 + 2 * video_autoencoder.config.time_factor
    assert same(frames, expected)
    assert [len(each) for each in pipe.decode_preview(latents.expand(2, -1, -1, -1, -1), max_frames=2)] == [5, 5]


def test_layers_of_an_image_are_a_list(video_autoencoder):
    pipe = QwenImagePipeline.from_components(vae=video_autoencoder, device="cpu", torch_dtype=torch.float32)
    latents = torch.randn(1, 16, 7, 2, 2, generator=torch.Generator().manual_seed(0))
    layers = pipe.decode_preview(latents)
    with torch.no_grad():
        expected = [tensor_to_images(video_autoencoder.decode(each))[0] for each in latents.unbind(2)]
    assert same(layers, expected)


@pytest.mark.parametrize("policy", [None, "cpu-offload", "dynamic"])
def test_a_call_with_previews_has_the_bits_of_one_without(policy, pipe):
    own = pipe if policy is None else under(policy)
    plain = own(**CALL, output_type="tensor")
    previews, states = [], []

    def on_step(step):
        previews.append(own.decode_preview(step.x0))
        states.append([managed(part) and managed(part).state for part in (own.vae, own.dit)])  # None without a policy

    def on_progress(each):
        if each.stage == "decode":
            # A preview that a unit of the autoencoder's own stage asks for uses it where it is.
            own.decode_preview(torch.zeros(1, 16, 2, 2))
            states.append([managed(own.vae) and managed(own.vae).state, managed(own.dit) and managed(own.dit).state])

    watched = own(**CALL, output_type="tensor", on_step=on_step, on_progress=on_progress)
    assert torch.equal(watched, plain)
    assert same(previews[-1:], tensor_to_images(plain))
    if policy is not None:
        assert states[:3] == [[BlockState.OFFLOAD] * 2] * 3, "nothing is beside the autoencoder, and it leaves"
        assert states[-1][1] is BlockState.OFFLOAD, "a network of the loop that was loaded again leaves for the decoder"
        assert {managed(part).state for part in (own.vae, own.dit, own.text_encoder)} == {BlockState.OFFLOAD}


def test_a_preview_in_another_thread_waits_for_the_stage():
    own = under("cpu-offload")
    plain, begun, found = own(**CALL, output_type="tensor"), threading.Event(), []
    with ThreadPoolExecutor(1) as pool:

        def on_step(step):
            if step.index == 0:
                found.append(pool.submit(lambda: begun.set() or own.decode_preview(torch.zeros(1, 16, 2, 2))))
                assert begun.wait(30)

        assert torch.equal(own(**CALL, output_type="tensor", on_step=on_step), plain)
        assert found[0].result(60).size == (16, 16)


def test_what_cannot_be_shown(pipe):
    with pytest.raises(MissingComponent, match="^decode_preview needs vae, which is not loaded"):
        tiny_z_image().decode_preview(torch.zeros(1, 16, 2, 2))
    with pytest.raises(ValueError, match=r"^latents of shape \(1, 4, 9\); expected b c h w, or b c t h w"):
        pipe.decode_preview(torch.zeros(1, 4, 9))
    with pytest.raises(ValueError, match="^max_size=0: expected an integer of at least 1"):
        pipe.decode_preview(torch.zeros(1, 16, 2, 2), max_size=0)
    with pytest.raises(TypeError, match="latents"):
        pipe.decode_preview([1, 2])
    with pytest.raises(NotFinite):
        pipe.decode_preview(torch.full((1, 16, 2, 2), float("nan")))


@unit("output")
def tinted(*, latents, colour):
    return latents * colour


class Tinted(ToyPipeline):
    """A pipeline whose output unit reads what a unit of the prompt writes."""

    output_units = (tinted,)


class Silent(ToyPipeline):
    """A pipeline without output units."""

    output_units = ()


def test_pipelines_of_plugins():
    latents = torch.full((1, 1, 64, 64), 0.5)
    assert toy_pipeline().decode_preview(latents) == 0.5
    with pytest.raises(PipelineError, match="^decode_preview cannot run unit 'tinted' outside of a call: .*'colour'"):
        toy_pipeline(Tinted).decode_preview(latents)
    with pytest.raises(PipelineError, match="^Silent has no output unit that writes 'output'"):
        Silent({"dit": ToyNet()}, device="cpu", torch_dtype=torch.float32).decode_preview(latents)
