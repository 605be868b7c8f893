"""Extensions: functions that change what enters the blocks of FLUX.2's transformer, and how the blocks attend.

An extension is a callable `(dit, stream) -> stream`. The transformer runs two stacks of blocks: `transformer_blocks`,
with separate weights for image and text, then `single_transformer_blocks` over the tokens of both. `Flux2DiT.forward`
applies its extensions in order, after the embedding and before the first block. An extension may append image tokens,
move tokens to other positions, change the time embedding, replace the attention of a block, or register a residual that
is added after a block.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal, Protocol, TypeAlias, get_args

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from diffsynth.core.attention import attention
from diffsynth_flux.flux2.config import Flux2DiTConfig

Rotary: TypeAlias = tuple[Float[Tensor, "#b s half_d"], Float[Tensor, "#b s half_d"]]
"""Cosine and sine of the rotary angles of the tokens."""

Residual: TypeAlias = Callable[[Float[Tensor, "b s e"]], Float[Tensor, "b s e"]]
"""Function of the tokens of text and image after a block; its result is added to them."""

Attend: TypeAlias = Callable[
    [Float[Tensor, "b s n d"], Float[Tensor, "b s n d"], Float[Tensor, "b s n d"]], Float[Tensor, "b s n d"]
]
"""Function of a block's queries and keys (after norm and RoPE) and values, tokens of the text first; it returns the
attention output."""

StackName: TypeAlias = Literal["transformer_blocks", "single_transformer_blocks"]
"""Name of a stack of blocks, which is the name of its `ModuleList` in the transformer."""

STACKS: tuple[StackName, ...] = get_args(StackName)

BlockIndex: TypeAlias = tuple[StackName, int]
"""Name of a stack and index of a block in it."""


def attend_all(block: BlockIndex) -> Attend:
    """Return the `Attend` of a block without extensions: `attention`, in which every token attends to all tokens."""
    return attention


@dataclass(frozen=True, eq=False, kw_only=True)
class Stream:
    """Inputs of the blocks.

    Args:
        image: tokens of the image, row by row, then tokens that extensions append, which are dropped at the end.
        text: tokens of the prompt.
        grid: rows and columns of image tokens.
        positions: RoPE positions (time, row, column, position in the text) of the text's tokens, then of the image's,
            on the CPU; set them with `Flux2DiT.set_positions`, which updates `rotary` too.
        rotary: cosine and sine of the rotary angles of the text's tokens, then of the image's.
        time_embed: embedded noise level and guidance, which modulate every block.
        attend: function of a block's stack and index that returns the block's attention.
        residuals: stack and index of a block -> functions whose results are added to the tokens after it, in order.
            Those of `transformer_blocks` get the tokens of the image alone.
        step: context of the sampling step, set by the caller of `Flux2DiT.forward`; None outside of a sampling loop.
    """

    image: Float[Tensor, "b i e"]
    text: Float[Tensor, "b t e"]
    grid: tuple[int, int]
    positions: Int[Tensor, "#b s axes"]
    rotary: Rotary
    time_embed: Float[Tensor, "b e"]
    attend: Callable[[BlockIndex], Attend] = attend_all
    residuals: Mapping[BlockIndex, tuple[Residual, ...]] = field(default_factory=dict)
    step: Any = None

    def with_residual(self, stack: StackName, block: int, residual: Residual) -> Stream:
        """Return a copy of this `Stream` with one more function for a block, whose result is added to the tokens after
        it.

        Args:
            stack: the block's stack.
            block: index of the block in its stack.
            residual: the function; it gets the tokens after the block and earlier residuals.
        """
        key = (stack, block)
        return replace(self, residuals={**self.residuals, key: (*self.residuals.get(key, ()), residual)})


class Network(Protocol):
    """Members of `Flux2DiT` that extensions use."""

    @property
    def config(self) -> Flux2DiTConfig:
        """Config of the network, a `Flux2DiTConfig`."""

    @property
    def transformer_blocks(self) -> nn.ModuleList:
        """Blocks with separate weights for image and text, an `nn.ModuleList` in the order of the forward pass."""

    @property
    def single_transformer_blocks(self) -> nn.ModuleList:
        """Blocks over the tokens of both, an `nn.ModuleList` in the order of the forward pass."""

    def set_positions(self, stream: Stream, positions: Int[Tensor, "#b s axes"]) -> Stream:
        """Return a copy of `stream`, a `Stream`, with the same tokens at RoPE positions `positions`."""

    def append_images(self, stream: Stream, images: Mapping[int, Float[Tensor, "b c h w"]]) -> Stream:
        """Return a copy of `stream`, a `Stream`, with the tokens of further latents after its image tokens."""


Extension: TypeAlias = Callable[[Network, Stream], Stream]
"""Function that changes the inputs of the blocks; see the module's docstring."""


def image_positions(grid: tuple[int, int], *, time: int = 0) -> Int[Tensor, "s axes"]:
    """Return an int CPU tensor `s axes` of the RoPE positions of an image's tokens, row by row.

    Args:
        grid: rows and columns of tokens.
        time: position on the time axis: 0 for the image that is computed, 10, 20, ... for reference images.
    """
    rows, columns = torch.meshgrid(torch.arange(grid[0]), torch.arange(grid[1]), indexing="ij")
    zeros = torch.zeros_like(rows)
    return torch.stack((zeros + time, rows, columns, zeros), dim=-1).flatten(0, 1)


def text_positions(length: int) -> Int[Tensor, "s axes"]:
    """Return an int CPU tensor `s axes` of the RoPE positions of a prompt's tokens: 0, 1, ... on the last axis."""
    positions = torch.zeros(length, 4, dtype=torch.long)
    positions[:, 3] = torch.arange(length)
    return positions
