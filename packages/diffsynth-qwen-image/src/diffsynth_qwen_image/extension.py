"""Extensions: functions that change what enters the blocks of Qwen-Image's transformer, and how the blocks attend.

An extension is a callable `(dit, stream) -> stream`. `QwenImageDiT.forward` applies its extensions in order, after the
embedding and before the first block. An extension may append the tokens of further images and texts, move tokens to
other positions, say which tokens attend to which, change the time embedding, replace the attention of a block, or
register a residual that is added to the tokens of the images after a block.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal, Protocol, TypeAlias, get_args

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from diffsynth.core.attention import attention
from diffsynth_qwen_image.config import QwenImageDiTConfig

Rotary: TypeAlias = tuple[Float[Tensor, "#b s half_d"], Float[Tensor, "#b s half_d"]]
"""Cosine and sine of the rotary angles of the tokens."""

Residual: TypeAlias = Callable[[Float[Tensor, "b i e"]], Float[Tensor, "b i e"]]
"""Function of the tokens of the images after a block; its result is added to them."""

Mask: TypeAlias = Bool[Tensor, "#b 1 #s s"] | None
"""Mask of the tokens that attend to each other, True for attended, the text's first; None means that all do."""

Attend: TypeAlias = Callable[
    [Float[Tensor, "b s n d"], Float[Tensor, "b s n d"], Float[Tensor, "b s n d"], Mask], Float[Tensor, "b s n d"]
]
"""Function of a block's queries and keys (after norm and RoPE), values and mask, tokens of the text first; it returns
the attention output."""

StackName: TypeAlias = Literal["transformer_blocks"]
"""Name of the stack of blocks, which is the name of its `ModuleList` in the transformer."""

STACKS: tuple[StackName, ...] = get_args(StackName)

BlockIndex: TypeAlias = tuple[StackName, int]
"""Name of a stack and index of a block in it."""

Grid: TypeAlias = tuple[int, int]
"""Rows and columns of the tokens of an image."""

LAYER_INPUT = -1
"""Position, on the first axis, of the image whose layers a network computes."""


def attend_masked(
    q: Float[Tensor, "b s n d"], k: Float[Tensor, "b s n d"], v: Float[Tensor, "b s n d"], mask: Mask = None
) -> Float[Tensor, "b s n d"]:
    """Return the attention output `b s n d` of a block without extensions: every token attends to all tokens that
    `mask` has.
    """
    return attention(q, k, v, mask=mask)


def attend_all(block: BlockIndex) -> Attend:
    """Return the `Attend` of a block without extensions, `attend_masked`."""
    return attend_masked


@dataclass(frozen=True, eq=False)
class Inputs:
    """Arguments of `QwenImageDiT.forward`, for networks of extensions that have embedders of their own.

    Args:
        latents: noised, scaled latents.
        sigma: noise levels in [0, 1], fp32.
        prompt_embeds: hidden states of the text encoder.
        prompt_mask: True for text and False for padding; None means that all tokens are text.
    """

    latents: Float[Tensor, "b c *t h w"]
    sigma: Float[Tensor, "b"]
    prompt_embeds: Float[Tensor, "b s e"]
    prompt_mask: Bool[Tensor, "b s"] | None = None


@dataclass(frozen=True, eq=False, kw_only=True)
class Stream:
    """Inputs of the blocks.

    Args:
        image: tokens of the images one after the other, each row by row: first those that are computed (one, or the
            layers of one), then those that extensions append, which are dropped at the end.
        text: tokens of the prompt, then padding; then, in the same form, those of texts that extensions append.
        grids: rows and columns of the tokens of each image.
        num_computed: number of images, from the first, that are computed.
        positions: RoPE positions (image, row, column) of the text's tokens, then of the images', on the CPU; set them
            with `QwenImageDiT.set_positions`, which updates `rotary` too.
        rotary: cosine and sine of the rotary angles of the text's tokens, then of the images'.
        time_embed: embedded noise level, which modulates every block.
        inputs: the arguments of the call.
        clean_time_embed: embedding of noise level 0, which modulates the tokens of appended images in its place; None
            uses `time_embed` for all.
        text_mask: True for text and False for padding; None means that all tokens are text.
        allowed: True where a token (row) attends to a token (column), the text's tokens first, then the images'; None
            means that all attend to all. Padding is in `text_mask`.
        attend: function of a block's stack and index that returns the block's attention.
        residuals: stack and index of a block -> functions whose results are added to the images' tokens after it, in
            order.
        step: context of the sampling step, set by the caller of `QwenImageDiT.forward`; None outside of a sampling
            loop.
    """

    image: Float[Tensor, "b i e"]
    text: Float[Tensor, "b t e"]
    grids: tuple[Grid, ...]
    num_computed: int
    positions: Int[Tensor, "#b s axes"]
    rotary: Rotary
    time_embed: Float[Tensor, "b e"]
    inputs: Inputs
    clean_time_embed: Float[Tensor, "b e"] | None = None
    text_mask: Bool[Tensor, "b t"] | None = None
    allowed: Bool[Tensor, "#b 1 s s"] | None = None
    attend: Callable[[BlockIndex], Attend] = attend_all
    residuals: Mapping[BlockIndex, tuple[Residual, ...]] = field(default_factory=dict)
    step: Any = None

    @property
    def num_computed_tokens(self) -> int:
        """Number of tokens, from the first, of the images that are computed."""
        return sum(rows * columns for rows, columns in self.grids[: self.num_computed])

    def mask(self) -> Mask:
        """Return the bool mask of the blocks' attention: `b 1 1 s`, True for tokens that are no padding of the text,
        or `b 1 s s` where `allowed` is given; None if all tokens attend to all.
        """
        if self.text_mask is None:
            return self.allowed
        kept = F.pad(self.text_mask, (0, self.image.shape[1]), value=True)[:, None, None]
        return kept if self.allowed is None else kept & self.allowed

    def with_residual(self, stack: StackName, block: int, residual: Residual) -> Stream:
        """Return a copy of this `Stream` with one more function for a block, whose result is added to the tokens of the
        images after it.

        Args:
            stack: the block's stack.
            block: index of the block in its stack.
            residual: the function; it gets the images' tokens after the block and earlier residuals.
        """
        key = (stack, block)
        return replace(self, residuals={**self.residuals, key: (*self.residuals.get(key, ()), residual)})


class Network(Protocol):
    """Members of `QwenImageDiT` that extensions use."""

    @property
    def config(self) -> QwenImageDiTConfig:
        """Config of the network, a `QwenImageDiTConfig`."""

    @property
    def transformer_blocks(self) -> nn.ModuleList:
        """Blocks over the tokens of text and images, an `nn.ModuleList` in the order of the forward pass."""

    def set_positions(self, stream: Stream, positions: Int[Tensor, "#b s axes"]) -> Stream:
        """Return a copy of `stream`, a `Stream`, with the same tokens at RoPE positions `positions`."""

    def append_images(self, stream: Stream, images: Sequence[Float[Tensor, "b c h w"]], **options: Any) -> Stream:
        """Return a copy of `stream`, a `Stream`, with the tokens of further latents after its images' tokens."""

    def append_texts(
        self, stream: Stream, texts: Sequence[Float[Tensor, "#b s e"]], masks: Sequence[Bool[Tensor, "#b s"] | None]
    ) -> Stream:
        """Return a copy of `stream`, a `Stream`, with the tokens of further texts after its text's tokens."""


Extension: TypeAlias = Callable[[Network, Stream], Stream]
"""Function that changes the inputs of the blocks; see the module's docstring."""


def image_positions(grid: Grid, *, index: int, spread_over: Grid | None = None) -> Int[Tensor, "s axes"]:
    """Return an int CPU tensor `s axes` of the RoPE positions (image, row, column) of an image's tokens, row by row.

    Rows and columns are counted from the middle of the image, so that positions are about as often negative as
    positive.

    Args:
        grid: rows and columns of tokens.
        index: position on the first axis: 0 for the image that is computed, 1, 2, ... for further ones.
        spread_over: rows and columns of another image, over whose positions those of this image are spread; None
            gives it positions of its own.
    """
    rows, columns = (_centered(count, over) for count, over in zip(grid, spread_over or grid, strict=True))
    rows, columns = torch.meshgrid(rows, columns, indexing="ij")
    return torch.stack((torch.full_like(rows, index), rows, columns), dim=-1).flatten(0, 1)


def text_positions(length: int, *, start: int) -> Int[Tensor, "s axes"]:
    """Return an int CPU tensor `s axes` of the RoPE positions of a prompt's tokens: `start`, `start + 1`, ... on every
    axis.
    """
    return (start + torch.arange(length))[:, None].expand(-1, 3)


def text_start(grids: Sequence[Grid], *, layered: bool) -> int:
    """Return the position of the first token of the text: behind the last row and column of all images.

    Args:
        grids: rows and columns of the tokens of each image.
        layered: whether the network computes layers; then the text is behind the last layer, too.
    """
    behind = max(side // 2 for grid in grids for side in grid)
    return max(behind, len(grids) - 1) if layered else behind


def insert_tokens(
    allowed: Bool[Tensor, "#b 1 s s"] | None, index: int, count: int
) -> Bool[Tensor, "#b 1 s_new s_new"] | None:
    """Return a copy of `Stream.allowed`, a bool tensor `#b 1 s_new s_new`, with `count` more tokens before token
    `index`, which attend to all tokens and are attended by all; None for None.
    """
    if allowed is None:
        return None
    for dim in (2, 3):
        before, after = allowed.tensor_split((index,), dim=dim)
        shape = list(allowed.shape)
        shape[dim] = count
        allowed = torch.cat((before, allowed.new_ones(shape), after), dim=dim)
    return allowed


def _centered(count: int, over: int) -> Int[Tensor, "s"]:
    first = over // 2 - over
    if count == over:
        return torch.arange(first, first + over)
    return torch.linspace(0, over - 1, count).long() + first
