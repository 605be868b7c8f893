"""Order and RoPE positions of the tokens of Z-Image: those of the image, then those of the caption, each with padding.

Padding is learned and takes part; the caption of a shorter prompt in a batch ends with tokens that are masked.
"""

from __future__ import annotations

from typing import TypeAlias

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor

from diffsynth_zimage.config import TOKEN_MULTIPLE

PromptMask: TypeAlias = Bool[Tensor, "b s"] | Int[Tensor, "b s"]
"""True, or the number of the caption's segment from 1, for text; False, or 0, for padding, on either side."""


def padded_length(length: int) -> int:
    """Return the number of tokens, an int, that `length` tokens have with their padding."""
    return -(-length // TOKEN_MULTIPLE) * TOKEN_MULTIPLE


def segment_lengths(prompt_embeds: Float[Tensor, "b s e"], prompt_mask: PromptMask | None) -> list[tuple[int, ...]]:
    """Return, for each prompt, a tuple of the numbers of tokens of its segments, without padding; one for a mask of
    bools, and for None, which means that all tokens are text.
    """
    if prompt_mask is None:
        return [(prompt_embeds.shape[1],)] * prompt_embeds.shape[0]
    if prompt_mask.dtype == torch.bool:
        return [(length,) for length in prompt_mask.sum(1).tolist()]
    numbers = range(1, int(prompt_mask.max()) + 1)
    counts = torch.stack([(prompt_mask == number).sum(1) for number in numbers], dim=1)
    return [tuple(each) for each in counts.tolist()]


def text_first(
    prompt_embeds: Float[Tensor, "b s e"], prompt_mask: PromptMask, longest: int
) -> Float[Tensor, "b longest e"]:
    """Return a tensor `b longest e`: the prompt embeddings with each text's tokens moved to the front; later entries
    are not used.
    """
    order = (prompt_mask == 0).to(torch.uint8).argsort(dim=1, stable=True)[:, :longest]
    return prompt_embeds.take_along_dim(order[:, :, None], dim=1)


def joint_positions(padded: list[int], grid: tuple[int, int]) -> Int[Tensor, "#b s axes"]:
    """Return an int CPU tensor `#b s axes` of RoPE positions (time, height, width) for the image's tokens, then the
    caption's.

    Caption tokens have times 1, 2, ..., padding included; the image has the next time.

    Args:
        padded: number of tokens of each caption with padding. Positions depend on it only, and are computed once for
            equal ones.
        grid: rows and columns of the image.
    """
    image_len, caption_len, each = padded_length(grid[0] * grid[1]), max(padded), sorted(set(padded))
    caption = torch.zeros(caption_len, 3, dtype=torch.long)
    caption[:, 0] = torch.arange(1, caption_len + 1)
    positions = torch.stack([torch.cat((image_positions(length + 1, grid, image_len), caption)) for length in each])
    return positions if len(each) == 1 else positions[[each.index(length) for length in padded]]


def image_positions(time: int, grid: tuple[int, int], count: int) -> Int[Tensor, "s axes"]:
    """Return an int CPU tensor `s axes` of RoPE positions (time, height, width) for the tokens of an image and its
    padding, which is at the origin.

    Args:
        time: of the image.
        grid: its rows and columns.
        count: number of tokens with padding.
    """
    ids = torch.zeros(count, 3, dtype=torch.long)
    image = ids[: grid[0] * grid[1]].view(*grid, 3)
    image[..., 0] = time
    image[..., 1] = torch.arange(grid[0])[:, None]
    image[..., 2] = torch.arange(grid[1])
    return ids


def padding_masks(
    padded: list[int], image_len: int, device: torch.device
) -> tuple[Bool[Tensor, "b 1 1 c"] | None, Bool[Tensor, "b 1 1 s"] | None]:
    """Return (mask of the caption's tokens, mask of the image's and the caption's tokens), True for attended tokens;
    (None, None) if all captions have one length.

    Args:
        padded: number of tokens of each caption with padding.
        image_len: number of tokens of the image with padding.
        device: of the masks.
    """
    if min(padded) == max(padded):
        return None, None
    attended = torch.arange(max(padded), device=device) < torch.tensor(padded, device=device)[:, None]
    return attended[:, None, None], F.pad(attended, (image_len, 0), value=True)[:, None, None]
