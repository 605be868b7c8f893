"""Prompts of regions (EliGen, Zhang et al. 2025, arXiv:2501.01097): entities, each with a prompt and a mask.

The texts of the entities are further texts of the transformer. The text of an entity attends to itself and to the
image's tokens in its region, and those attend to it; texts do not attend to each other. There is no strength: the LoRAs
of EliGen are trained for this attention mask.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypedDict

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from PIL import Image
from torch import Tensor

from diffsynth.core.data.image import ResizeMode
from diffsynth.runtime.feature import Condition, Configs, Feature
from diffsynth.runtime.guidance import ignored_without_guidance
from diffsynth.runtime.image_units import round_up
from diffsynth.runtime.images import mask_to_tensor
from diffsynth.runtime.unit import Phase, unit
from diffsynth_qwen_image.config import TOKEN_FACTOR, VAE_FACTOR
from diffsynth_qwen_image.extension import Grid, Network, Stream
from diffsynth_qwen_image.units import encode_prompt


class EntityArguments(TypedDict, total=False):
    """Prompts of regions of the image.

    Args:
        eligen_entity_prompts: Prompts of the entities of the image, for Qwen-Image-EliGen; `prompt` describes all of
            it. Every result gets all of them.
        eligen_entity_masks: For each entity, an image that is white where its prompt applies; it is scaled to the
            result's size by `resize_mode`. Regions may overlap.
        eligen_enable_on_negative: Whether the negative prompt is in the regions, too, in place of the entities'
            prompts.
    """

    eligen_entity_prompts: Sequence[str] | None
    eligen_entity_masks: Sequence[Image.Image] | None
    eligen_enable_on_negative: bool


@dataclass(frozen=True, eq=False)
class Texts:
    """Hidden states of texts, each with its mask.

    Args:
        states: of each text, of one item or of the batch.
        masks: for each text, True for text and False for padding; None means that all its tokens are text.
    """

    states: tuple[Float[Tensor, "#b s e"], ...]
    masks: tuple[Bool[Tensor, "#b s"] | None, ...]


@dataclass(frozen=True, eq=False)
class Entities:
    """Extension that appends the texts of entities, which attend to their regions.

    Args:
        texts: of the entities.
        regions: True for the tokens of the computed image that are in the region of an entity. Other images, such as
            layers and references, have the same regions, scaled to their rows and columns.
    """

    texts: Texts
    regions: Bool[Tensor, "n rows columns"]

    def __call__(self, dit: Network, stream: Stream) -> Stream:
        """Return the stream with the entities' texts; see `diffsynth_qwen_image.extension.Extension`."""
        lengths = (stream.text.shape[1], *(states.shape[1] for states in self.texts.states))
        stream = dit.append_texts(stream, self.texts.states, self.texts.masks)
        allowed = entity_mask(lengths, regions_of_grids(self.regions, stream.grids))
        return replace(stream, allowed=allowed if stream.allowed is None else allowed & stream.allowed)


def entity_mask(lengths: Sequence[int], regions: Bool[Tensor, "n i"]) -> Bool[Tensor, "1 1 s s"]:
    """Return a bool tensor `1 1 s s`, True where a token (row) attends to a token (column).

    A text attends to itself. The first, which is the prompt, and all images attend to each other, and so do the text of
    an entity and the images' tokens in its region. Images attend to images.

    Args:
        lengths: number of tokens of each text, that of the prompt first.
        regions: for each text but the first, True for the images' tokens in its region.
    """
    device, count = regions.device, regions.shape[1]
    owner = torch.cat([torch.full((length,), index, device=device) for index, length in enumerate(lengths)])
    of_texts = torch.cat((regions.new_ones(1, count), regions))[owner]
    texts = torch.cat((owner[:, None] == owner, of_texts), dim=1)
    images = torch.cat((of_texts.T, regions.new_ones(count, count)), dim=1)
    return torch.cat((texts, images))[None, None]


def regions_of_grids(regions: Bool[Tensor, "n rows columns"], grids: Sequence[Grid]) -> Bool[Tensor, "n i"]:
    """Return a bool tensor `n i`: the regions in the tokens of each image, one image after the other; a token of an
    image of another size is in a region if the nearest token of the first image is.

    Args:
        regions: in the tokens of the first image.
        grids: rows and columns of the tokens of each image.
    """
    levels = regions[:, None].float()
    scaled = (F.interpolate(levels, size=grid, mode="nearest-exact") for grid in grids)
    return torch.cat([level.flatten(1) for level in scaled], dim=1) > 0


def token_region(
    mask: Image.Image, height: int, width: int, *, resize_mode: ResizeMode = "stretch"
) -> Bool[Tensor, "rows columns"]:
    """Return a bool CPU tensor `rows columns` of the tokens that a mask covers: those of which a latent pixel (8 x 8
    pixels) is white.

    Args:
        mask: an image, see `diffsynth.runtime.images.mask_to_tensor`.
        height, width: size of the result in pixels, multiples of 16.
        resize_mode: how a mask of another aspect ratio is scaled.
    """
    levels = mask_to_tensor(mask, height // VAE_FACTOR, width // VAE_FACTOR, resize_mode=resize_mode)
    return F.max_pool2d(levels, TOKEN_FACTOR // VAE_FACTOR)[0, 0] > 0


@unit("entity_texts", phase=Phase.TEXT, only_with="eligen_entity_prompts")
def encode_entities(
    text_encoder: Any,
    tokenizer: Any,
    *,
    eligen_entity_prompts: Sequence[str] | None = None,
    prompt_weighting: bool = False,
    device: torch.device,
    dtype: torch.dtype,
) -> Texts:
    """Return `Texts` of the entities' prompts, which are encoded as prompts without images are."""
    prompts, options = list(eligen_entity_prompts or ()), {"device": device, "dtype": dtype}
    embeds, mask = encode_prompt.function(
        text_encoder, tokenizer, prompt=prompts, prompt_weighting=prompt_weighting, **options
    )
    if mask is None:
        return Texts(tuple(embeds.split(1)), (None,) * len(embeds))
    kept = (states[None, of_text] for states, of_text in zip(embeds, mask, strict=True))
    return Texts(tuple(kept), (None,) * len(embeds))


@unit(
    "negative_entity_texts",
    only_with="eligen_entity_prompts",
    ignores=ignored_without_guidance("eligen_enable_on_negative"),
)
def repeat_negative_prompt(
    *,
    eligen_entity_prompts: Sequence[str] | None = None,
    eligen_enable_on_negative: bool = False,
    prompt_embeds: Float[Tensor, "b s e"],
    prompt_mask: Bool[Tensor, "b s"] | None,
) -> Texts | None:
    """Return `Texts` with the negative prompt for each entity; None unless the negative side is enabled."""
    if not eligen_enable_on_negative:
        return None
    count = len(eligen_entity_prompts or ())
    return Texts((prompt_embeds,) * count, (prompt_mask,) * count)


@unit("entities", branches={"uncond": {"entity_texts": "negative_entity_texts"}}, only_with="eligen_entity_prompts")
def place_entities(
    *,
    eligen_entity_prompts: Sequence[str] | None = None,
    eligen_entity_masks: Sequence[Image.Image] | None = None,
    entity_texts: Texts | None,
    height: int,
    width: int,
    resize_mode: ResizeMode,
    device: torch.device,
) -> Entities | None:
    """Return `Entities`, the texts with their regions; None without texts."""
    if entity_texts is None:
        return None
    masks = eligen_entity_masks or ()
    regions = [token_region(mask, height, width, resize_mode=resize_mode) for mask in masks]
    return Entities(entity_texts, torch.stack(regions).to(device))


def check(configs: Configs, values: Mapping[str, Any]) -> None:
    """Raise ValueError for entities that cannot be placed.

    Raises:
        ValueError: prompts and masks of different counts, or a mask that covers nothing.
    """
    prompts, masks = (values[name] or () for name in ("eligen_entity_prompts", "eligen_entity_masks"))
    if len(prompts) != len(masks):
        raise ValueError(
            f"eligen_entity_prompts has {len(prompts)} texts and eligen_entity_masks {len(masks)} images; expected one "
            "mask for each prompt"
        )
    height, width = (round_up(values[side], TOKEN_FACTOR) for side in ("height", "width"))
    for index, mask in enumerate(masks):
        if not token_region(mask, height, width, resize_mode=values["resize_mode"]).any():
            raise ValueError(
                f"eligen_entity_masks[{index}], of {mask.width}x{mask.height} pixels, covers nothing of the result of "
                f"{width}x{height}; expected white pixels where its prompt applies, an area of at least "
                f"{VAE_FACTOR}x{VAE_FACTOR} pixels of the result"
            )


ELIGEN = Feature(
    "eligen",
    arguments=EntityArguments,
    units=(encode_entities, repeat_negative_prompt, place_entities),
    conditions={"entities": Condition("an image has no frames", batch="separate")},
    check=check,
)
