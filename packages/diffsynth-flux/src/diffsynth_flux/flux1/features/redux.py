"""Image variation with FLUX.1-Redux: tokens of an image after those of the text."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, TypedDict

import torch
from jaxtyping import Float
from PIL import Image
from torch import Tensor

from diffsynth.errors import MissingComponent
from diffsynth.models.image_pixels import siglip_pixels
from diffsynth.runtime.feature import Configs, Feature
from diffsynth.runtime.role import Role
from diffsynth.runtime.unit import Phase, unit

ENCODER, EMBEDDER = "image_encoder", "image_embedder"

ENCODER_ROLE = Role(architectures=("siglip_image_encoder",), optional=True)
"""The role of the image encoder, which IP-Adapters read, too."""


class ReduxArguments(TypedDict, total=False):
    """Image to vary.

    Args:
        flux_redux_image: Image that the result is a variation of, for FLUX.1-Redux; resized to a square for the image
            encoder. It takes the place of an empty prompt, and is combined with another one.
    """

    flux_redux_image: Image.Image | None


@unit("redux_tokens", "redux_tokens_of_uncond", phase=Phase.ENCODE, only_with="flux_redux_image")
def encode_redux_image(
    image_encoder: Any,
    image_embedder: Any,
    *,
    flux_redux_image: Image.Image | None = None,
    device: torch.device,
    dtype: torch.dtype,
) -> tuple[Float[Tensor, "1 r e"], None]:
    """Return (text tokens `1 r e` of the image for the conditional branch of guidance, None for the unconditional)."""
    assert flux_redux_image is not None, "the unit runs only with it"
    pixels = siglip_pixels(flux_redux_image, image_encoder.config.image_size)
    return image_embedder(image_encoder(pixels.to(device, dtype))), None


@unit(
    "prompt_embeds",
    "pooled_prompt_embeds",
    branches={"uncond": {"redux_tokens": "redux_tokens_of_uncond"}},
    only_with="flux_redux_image",
)
def append_redux_tokens(
    *,
    flux_redux_image: Image.Image | None = None,
    prompt: str | Sequence[str] = "",
    prompt_embeds: Float[Tensor, "b t e"],
    pooled_prompt_embeds: Float[Tensor, "b e_pooled"],
    redux_tokens: Float[Tensor, "1 r e"] | None,
) -> tuple[Float[Tensor, "b s e"], Float[Tensor, "b e_pooled"]]:
    """Return (hidden states `b s e` of the prompts, then the tokens of the image; pooled hidden states `b e_pooled`),
    both zero for an empty prompt; unchanged in the unconditional branch of guidance.
    """
    if redux_tokens is None:
        return prompt_embeds, pooled_prompt_embeds
    prompts = [prompt] if isinstance(prompt, str) else list(prompt)
    written = torch.tensor([float(text != "") for text in prompts]).to(prompt_embeds)
    text = prompt_embeds * written[:, None, None]
    tokens = redux_tokens.to(text).expand(len(text), -1, -1)
    return torch.cat((text, tokens), dim=1), pooled_prompt_embeds * written[:, None]


def check(configs: Configs, values: Mapping[str, Any]) -> None:
    """Raise MissingComponent for an image to vary without both networks of Redux.

    Raises:
        MissingComponent: the image encoder or the projection is not loaded.
    """
    if values["flux_redux_image"] is None:
        return
    missing = [role for role in (ENCODER, EMBEDDER) if configs[role] is None]
    if missing:
        raise MissingComponent(
            f"flux_redux_image needs {' and '.join(missing)}; add the files of FLUX.1-Redux-dev to model_configs"
        )


REDUX = Feature(
    "redux",
    arguments=ReduxArguments,
    roles={
        ENCODER: ENCODER_ROLE,
        EMBEDDER: Role(architectures=("flux_redux_embedder",), optional=True),
    },
    units=(encode_redux_image, append_redux_tokens),
    check=check,
)
