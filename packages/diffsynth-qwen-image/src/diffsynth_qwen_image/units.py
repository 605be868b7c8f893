"""Units of the Qwen-Image pipeline, in the order they run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any

import torch
from jaxtyping import Bool, Float
from PIL import Image
from torch import Tensor

from diffsynth.core.data.image import ResizeMode
from diffsynth.models.tiles import Tiling
from diffsynth.runtime.argument_types import RandDevice
from diffsynth.runtime.image_units import (
    check_input_image,
    check_strength,
    encode_input_image,
    ignored_input,
    image_size,
    round_up,
    set_tiling,
)
from diffsynth.runtime.images import check_alpha, image_list, images_to_batch
from diffsynth.runtime.prompt_weights import check_prompt_weights, encode_weighted, weighted_texts
from diffsynth.runtime.prompts import distinct_prompts
from diffsynth.runtime.unit import Phase, unit
from diffsynth.sampling.noise import add_noise, initial_noise
from diffsynth.sampling.schedule import (
    LIGHTNING_MU,
    qwen_image_layered_mu,
    qwen_image_lightning_sigmas,
    qwen_image_sigmas,
)
from diffsynth_qwen_image.config import TOKEN_FACTOR, VAE_FACTOR
from diffsynth_qwen_image.prompts import MAX_PROMPT_TOKENS, PromptImages, tokenize

round_size = image_size(multiple=TOKEN_FACTOR, default=1328)


def check_schedule(values: Mapping[str, Any]) -> None:
    """Raise ValueError for noise levels that are no schedule, or for two arguments that would make others."""
    sigmas = values["sigmas"]
    if sigmas is None:
        for name, default in (("exponential_shift_mu", None), ("lightning_schedule", False)):
            if values["layered_schedule"] and values[name] != default:
                raise ValueError(f"layered_schedule and {name}={values[name]} are given; leave out one")
        return
    levels = [float(level) for level in sigmas]
    falling = all(before > after for before, after in pairwise([*levels, 0.0]))
    if not levels or not falling or levels[0] > 1:
        raise ValueError(
            f"sigmas={levels}: expected at least one noise level in (0, 1], each lower than the one before; the last "
            "step goes to 0, which is not listed"
        )
    if values["denoising_strength"] != 1:
        raise ValueError(
            f"sigmas and denoising_strength={values['denoising_strength']} are given; leave out one: each sets the "
            "noise levels"
        )


def ignored_shifts(values: Mapping[str, Any]) -> dict[str, str]:
    """Return a dict argument -> reason of those that change no noise level of a call, as `Unit.ignores`; models and
    LoRAs may set their defaults.
    """
    if values["sigmas"] is None:
        return {}
    shifts = ("exponential_shift_mu", "lightning_schedule", "layered_schedule")
    return dict.fromkeys(shifts, "sigmas has the noise levels")


@unit("sigmas", phase=Phase.SHAPE, check=check_schedule, ignores=ignored_shifts)
def schedule(
    *,
    num_inference_steps: int,
    denoising_strength: float = 1.0,
    exponential_shift_mu: float | None = None,
    lightning_schedule: bool = False,
    layered_schedule: bool = False,
    sigmas: Sequence[float] | None = None,
    height: int,
    width: int,
) -> Float[Tensor, "steps_plus_1"]:
    """Return a tensor `steps_plus_1` of the noise levels (sigmas in [0, 1]) of the steps, falling, and a last 0; the
    more tokens the image has, the higher they are.
    """
    if sigmas is not None:
        return torch.tensor([*map(float, sigmas), 0.0])
    strength = denoising_strength
    if lightning_schedule:
        mu = LIGHTNING_MU if exponential_shift_mu is None else exponential_shift_mu
        return qwen_image_lightning_sigmas(num_inference_steps, mu=mu, strength=strength)
    num_tokens = (round_up(height, TOKEN_FACTOR) // TOKEN_FACTOR) * (round_up(width, TOKEN_FACTOR) // TOKEN_FACTOR)
    mu = qwen_image_layered_mu(num_tokens) if layered_schedule else exponential_shift_mu
    return qwen_image_sigmas(num_inference_steps, num_tokens=num_tokens, mu=mu, strength=strength)


@unit(
    "prompt_embeds",
    "prompt_mask",
    branches={"uncond": {"prompt": "negative_prompt"}},
    phase=Phase.TEXT,
    check=check_prompt_weights,
)
def encode_prompt(
    text_encoder: Any,
    tokenizer: Any,
    *,
    prompt: str | Sequence[str] = "",
    prompt_weighting: bool = False,
    prompt_images: PromptImages | None = None,
    device: torch.device,
    dtype: torch.dtype,
) -> tuple[Float[Tensor, "b s e"], Bool[Tensor, "b s"] | None]:
    """Return (hidden states `b s e` of the prompts, with images before them if there are any; bool mask `b s`, True for
    text, False for padding to the longest prompt, or None if nothing is padded).

    Prompts over `MAX_PROMPT_TOKENS`, besides the images, are cut with a warning; equal ones are encoded once.
    """
    distinct, order = distinct_prompts(prompt, device=device)
    texts = weighted_texts(distinct, prompt_weighting=prompt_weighting, max_tokens=MAX_PROMPT_TOKENS)
    tokens = tokenize(tokenizer, texts, prompt_images)
    images: dict[str, Any] = {}
    if prompt_images is not None:
        patches = prompt_images.patches.repeat(len(distinct), 1).to(device, dtype)
        images = {"patches": patches, "grids": prompt_images.grids * len(distinct), "image_mask": tokens.image_mask}
    mask = tokens.mask.to(device)
    embeds = encode_weighted(
        lambda ids: text_encoder(ids, mask, **images),
        tokens.input_ids.to(device),
        tokens.weights,
        padding=tokenizer.pad_token_id,
    )
    kept = tokens.mask[:, tokens.dropped :].bool()
    return embeds[:, tokens.dropped :][order], None if bool(kept.all()) else kept.to(device)[order]


def check_input(values: Mapping[str, Any]) -> None:
    """Raise ValueError unless a call has as many input images as results, or one; for layers, the image and each of
    its layers, with transparency.
    """
    images, layer_num = values["input_image"], values["layer_num"]
    if layer_num is None:
        check_input_image(values)
        return
    layers = None if isinstance(images, Tensor) else image_list(images)
    if layers is None or len(layers) != layer_num + 1:
        found = "is a tensor" if layers is None else f"has {len(layers)} images"
        raise ValueError(
            f"input_image {found}, and layer_num is {layer_num}; expected a list of {layer_num + 1} RGBA images: the "
            "image, and then its layers"
        )
    check_alpha("input_image", layers)


@unit("input_latents", phase=Phase.ENCODE, only_with="input_image", check=check_input)
def encode_input(
    vae: Any,
    *,
    input_image: Image.Image | Sequence[Image.Image] | Tensor | None = None,
    height: int,
    width: int,
    resize_mode: ResizeMode = "stretch",
    tiling: Tiling,
    batch_size: int,
    device: torch.device,
    dtype: torch.dtype,
) -> Float[Tensor, "b c *t h w"]:
    """Return the latents of the input image, a tensor `b c h w` with an item for each result; with the autoencoder of
    RGBA images `b c t h w`, those of an image and its layers, the same for each result.
    """
    assert input_image is not None, "the unit runs only with it"
    size = {"height": height, "width": width, "resize_mode": resize_mode}
    if vae.config.pixel_mode == "RGB":
        given = {"input_image": input_image, "batch_size": batch_size, "device": device, "dtype": dtype}
        return encode_input_image(vae, **given, **size, tiling=tiling)
    pixels = images_to_batch(input_image, **size, mode="RGBA").to(device, dtype)
    layers = [vae.encode(layer[None], **tiling) for layer in pixels]
    return torch.stack(layers, dim=2).expand(batch_size, -1, -1, -1, -1)


@unit("latents", random=True, phase=Phase.LATENTS, check=check_strength, ignores=ignored_input)
def initial_latents(
    *,
    input_latents: Float[Tensor, "b c *t h w"] | None = None,
    layer_num: int | None = None,
    sigmas: Float[Tensor, "steps_plus_1"],
    height: int,
    width: int,
    latent_channels: int,
    seeds: list[int | None],
    rand_device: RandDevice = "cpu",
    device: torch.device,
    dtype: torch.dtype,
) -> Float[Tensor, "b c *t h w"]:
    """Return the latents of the first step, `b c h w`, or `b c t h w` of an image and its layers: noise, or
    `input_latents` noised to the first noise level.
    """
    layers = () if layer_num is None else (layer_num + 1,)
    shape = (*layers, latent_channels, height // VAE_FACTOR, width // VAE_FACTOR)
    noise = initial_noise(shape, seeds, rand_device=rand_device, dtype=dtype, device=device)
    if layers:  # each layer is drawn as an image, one after the other
        noise = noise.transpose(1, 2).contiguous()
    return noise if input_latents is None else add_noise(input_latents, noise, sigmas[0])


UNITS = (round_size, set_tiling, schedule, encode_prompt, encode_input, initial_latents)
