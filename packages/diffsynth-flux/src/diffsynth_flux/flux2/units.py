"""Units of the FLUX.2 pipeline, in the order they run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from diffsynth.runtime.argument_types import RandDevice
from diffsynth.runtime.image_units import (
    check_strength,
    encode_input_image,
    ignored_input,
    image_size,
    round_up,
    set_tiling,
)
from diffsynth.runtime.prompt_weights import check_prompt_weights, encode_weighted, tokenize_weighted, weighted_texts
from diffsynth.runtime.prompts import distinct_prompts, log_cut
from diffsynth.runtime.unit import Phase, unit
from diffsynth.sampling import noise
from diffsynth.sampling.schedule import flux2_sigmas
from diffsynth_flux.flux2.config import PROMPT_TOKENS, VAE_FACTOR, MistralTextEncoderConfig

EMBEDDED_GUIDANCE = 4.0
"""Default guidance scale of the distilled network."""

SYSTEM_MESSAGE = (
    "You are an AI that reasons about image descriptions. You give structured responses focusing on object "
    "relationships, object\nattribution and actions without speculation."
)
"""Message before every prompt of FLUX.2-dev, as in training, with its line break."""

IMAGE_TOKEN = "[IMG]"
"""Token that Mistral replaces by an image; it is removed from prompts."""

round_size = image_size(multiple=VAE_FACTOR)


@unit("sigmas", phase=Phase.SHAPE)
def schedule(
    *, num_inference_steps: int, denoising_strength: float = 1.0, height: int, width: int
) -> Float[Tensor, "steps_plus_1"]:
    """Return a tensor `steps_plus_1` of the noise levels (sigmas in [0, 1]) of the steps, falling, and a last 0; the
    more tokens the image has, the higher they are.
    """
    num_tokens = (height // VAE_FACTOR) * (width // VAE_FACTOR)
    return flux2_sigmas(num_inference_steps, num_tokens=num_tokens, strength=denoising_strength)


@unit(
    "prompt_embeds",
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
    device: torch.device,
) -> Float[Tensor, "b s e"]:
    """Return the hidden states `b s e` of the prompts, padded or cut to `PROMPT_TOKENS` tokens; what is cut is logged,
    and equal prompts are encoded once.
    """
    distinct, order = distinct_prompts(prompt, device=device)
    mistral = isinstance(text_encoder.config, MistralTextEncoderConfig)
    if mistral:
        distinct = [text.replace(IMAGE_TOKEN, "") for text in distinct]
    prompts = weighted_texts(distinct, prompt_weighting=prompt_weighting, max_tokens=PROMPT_TOKENS)
    texts = [prompt.within(lambda text: chat_text(text, mistral=mistral)) for prompt in prompts]
    _log_cut(tokenizer, [text.text for text in texts])
    # The template has its special tokens; padding is on the side on which the tokenizer puts it, as in training.
    tokens, weights = tokenize_weighted(
        tokenizer,
        texts,
        add_special_tokens=False,
        padding="max_length",
        truncation=True,
        max_length=PROMPT_TOKENS,
    )
    mask, layers = tokens["attention_mask"].to(device), prompt_layers(text_encoder.config.num_layers)
    return encode_weighted(
        lambda ids: text_encoder(ids, mask, layers=layers),
        tokens["input_ids"].to(device),
        weights,
        padding=tokenizer.pad_token_id,
    )[order]


def prompt_layers(num_layers: int) -> tuple[int, int, int]:
    """Return the indices of the hidden states that FLUX.2 reads: after a quarter, a half and three quarters of the
    layers.

    These are 10, 20 and 30 of Mistral's 40 layers, and 9, 18 and 27 of Qwen3's 36.
    """
    return num_layers // 4, num_layers // 2, num_layers * 3 // 4


def chat_text(prompt: str, *, mistral: bool) -> str:
    """Return a str: `prompt` in the chat template of the text encoder, as in training.

    The template in the tokenizer's folder is a program, and is not run.

    Args:
        prompt: of the user.
        mistral: whether the text encoder is Mistral, with a system message before the prompt; else it is Qwen3, with
            an empty thinking block after it.
    """
    if mistral:
        system = f"<s>[SYSTEM_PROMPT]{SYSTEM_MESSAGE}[/SYSTEM_PROMPT]"
        return f"{system}[INST]{prompt}[/INST]"
    return f"<|im_start|>user\n{prompt}<|im_end|>\n<|im_start|>assistant\n<think>\n\n</think>\n\n"


def _log_cut(tokenizer: Any, texts: Sequence[str]) -> None:
    for text in texts:
        # No token stands for less than one byte, so a short text is not tokenized twice.
        if len(text.encode()) <= PROMPT_TOKENS:
            continue
        log_cut(tokenizer, tokenizer(text, add_special_tokens=False)["input_ids"], most=PROMPT_TOKENS)


def check_guidance(values: Mapping[str, Any]) -> None:
    """Raise ValueError if a call sets a guidance scale for a network that takes none."""
    scale = values["embedded_guidance"]
    if not values.get("embeds_guidance", True) and scale != EMBEDDED_GUIDANCE:
        raise ValueError(
            f"embedded_guidance={scale} is given, but this network takes no guidance scale, as FLUX.2-klein; leave it "
            "out"
        )


@unit("network_guidance", check=check_guidance)
def network_guidance(
    *, embedded_guidance: float = EMBEDDED_GUIDANCE, embeds_guidance: bool, batch_size: int, device: torch.device
) -> Float[Tensor, "b"] | None:
    """Return the guidance scale that the network takes, an fp32 tensor `b`; None for a network that takes none."""
    if not embeds_guidance:
        return None
    return torch.full((batch_size,), float(embedded_guidance), device=device)


def check_initial_noise(values: Mapping[str, Any]) -> None:
    """Raise ValueError if a call's `initial_noise` is not of the shape of its latents, or if a call without it begins
    at a noise level below 1 without an input image.
    """
    given, count = values["initial_noise"], values["batch_size"]
    if given is None:
        check_strength(values)
        return
    rows, columns = (round_up(values[name], VAE_FACTOR) // VAE_FACTOR for name in ("height", "width"))
    shape = (values["latent_channels"], rows, columns)
    if tuple(given.shape[1:]) != shape or len(given) not in (1, count):
        raise ValueError(
            f"initial_noise has the shape {tuple(given.shape)}; expected (1, {', '.join(map(str, shape))})"
            + (f", or {count} in place of 1" if count > 1 else "")
        )


def ignored_inputs(values: Mapping[str, Any]) -> dict[str, str]:
    """Return a dict name -> reason of what does not change the first latents of a call, such as the seeds of noise that
    is given.
    """
    ignored = ignored_input(values)
    if values["initial_noise"] is not None:
        ignored |= dict.fromkeys(("seeds", "rand_device"), "initial_noise is given")
    return ignored


@unit("latents", random=True, phase=Phase.LATENTS, check=check_initial_noise, ignores=ignored_inputs)
def initial_latents(
    *,
    initial_noise: Float[Tensor, "#b c h w"] | None = None,
    input_latents: Float[Tensor, "b c h w"] | None = None,
    sigmas: Float[Tensor, "steps_plus_1"],
    height: int,
    width: int,
    latent_channels: int,
    seeds: list[int | None],
    rand_device: RandDevice = "cpu",
    device: torch.device,
    dtype: torch.dtype,
) -> Float[Tensor, "b c h w"]:
    """Return the packed latents `b c h w` of the first step, an image for each of `seeds`, in the given dtype: noise,
    or `input_latents` noised to the first noise level.
    """
    shape = (latent_channels, height // VAE_FACTOR, width // VAE_FACTOR)
    if initial_noise is None:
        start = noise.initial_noise(shape, seeds, rand_device=rand_device, dtype=dtype, device=device)
    else:
        start = initial_noise.to(device, dtype).expand(len(seeds), -1, -1, -1)
    return start if input_latents is None else noise.add_noise(input_latents, start, sigmas[0])


UNITS = (round_size, set_tiling, schedule, encode_prompt, encode_input_image, network_guidance, initial_latents)
