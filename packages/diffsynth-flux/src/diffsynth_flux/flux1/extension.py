"""Extensions: functions that change what enters the blocks of the FLUX.1 transformer, and what is added after them.

An extension is a callable `(dit, stream) -> stream`. The transformer runs two stacks of blocks: `double_blocks`, with
separate weights for the tokens of the image and of the text, then `single_blocks`, over both. `FluxDiT.forward` applies
its extensions in order, after the embedding and before the first block. An extension may change every field of
`Stream`: append image or text tokens, add to tokens, move them to other positions, mask them, change the modulation,
skip a block, register a residual that is added to the image's tokens after a block, or register an attention of the
block's queries to something else, such as the tokens of a reference image.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal, Protocol, TypeAlias, get_args

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from diffsynth_flux.flux1.config import FluxDiTConfig

Rotary: TypeAlias = tuple[Float[Tensor, "#b s half_d"], Float[Tensor, "#b s half_d"]]
"""Cosine and sine of the rotary angles of the tokens."""

Residual: TypeAlias = Callable[[Float[Tensor, "b i e"]], Float[Tensor, "b i e"]]
"""Function of the image's tokens after a block; its result is added to them."""

QueryAttention: TypeAlias = Callable[[Float[Tensor, "b s n d"]], Float[Tensor, "b s n d"]]
"""Function of a block's queries, after their norm and before RoPE; its result is added to the output of the block's
attention, before the projection. In `double_blocks` the queries are those of the image's tokens; in `single_blocks`,
those of the text's tokens, then of the image's."""

StackName: TypeAlias = Literal["double_blocks", "single_blocks"]
"""Name of a stack of blocks, which is the name of its `ModuleList` in the transformer."""

STACKS: tuple[StackName, ...] = get_args(StackName)

BlockIndex: TypeAlias = tuple[StackName, int]
"""Name of a stack and index of a block in it."""


@dataclass(frozen=True, eq=False, kw_only=True)
class Inputs:
    """Arguments of `FluxDiT.forward`, for networks of extensions that have embedders of their own.

    Args:
        patches: latents without condition latents, as tokens: row by row, each with the channels of its four latent
            pixels.
        sigma: noise levels in [0, 1], fp32.
        prompt_embeds: hidden states of T5.
        pooled_prompt_embeds: pooled hidden state of CLIP.
        guidance: the guidance input; None for a network without.
    """

    patches: Float[Tensor, "b i c4"]
    sigma: Float[Tensor, "b"]
    prompt_embeds: Float[Tensor, "b t e_text"]
    pooled_prompt_embeds: Float[Tensor, "b e_pooled"]
    guidance: Float[Tensor, "b"] | None


@dataclass(frozen=True, eq=False, kw_only=True)
class Stream:
    """Inputs of the blocks.

    Args:
        image: tokens of the image, row by row. Tokens that an extension appends are dropped at the end.
        text: tokens of the text.
        grid: rows and columns of image tokens.
        positions: RoPE positions (reference index, row, column) of the text's tokens, then of the image's, on the CPU;
            set them with `FluxDiT.set_positions`, which updates `rotary` too.
        rotary: cosine and sine of the rotary angles of the text's tokens, then of the image's.
        modulation: embedded noise level, guidance and pooled text, from which each block makes scales and gates.
        inputs: the arguments of the call.
        mask: which tokens attend to which, True for attended, those of the text before those of the image; None is all.
        residuals: stack and index of a block -> functions whose results are added to the image's tokens after it, in
            order.
        query_attention: stack and index of a block -> functions of its queries whose results are added to the output of
            its attention, in order.
        skip_blocks: stacks and indices of blocks that are skipped together with their residuals.
        step: context of the sampling step, set by the caller of `FluxDiT.forward`; None outside of a sampling loop.
    """

    image: Float[Tensor, "b i e"]
    text: Float[Tensor, "b t e"]
    grid: tuple[int, int]
    positions: Int[Tensor, "#b s axes"]
    rotary: Rotary
    modulation: Float[Tensor, "b e"]
    inputs: Inputs
    mask: Bool[Tensor, "b 1 s s"] | None = None
    residuals: Mapping[BlockIndex, tuple[Residual, ...]] = field(default_factory=dict)
    query_attention: Mapping[BlockIndex, tuple[QueryAttention, ...]] = field(default_factory=dict)
    skip_blocks: frozenset[BlockIndex] = frozenset()
    step: Any = None

    def with_residual(self, stack: StackName, block: int, residual: Residual) -> Stream:
        """Return a copy of this `Stream` with one more function for a block, whose result is added to the image's
        tokens after it.

        Args:
            stack: the block's stack.
            block: index of the block in its stack.
            residual: the function; it gets the image's tokens after the block and earlier residuals.
        """
        key = (stack, block)
        return replace(self, residuals={**self.residuals, key: (*self.residuals.get(key, ()), residual)})

    def with_query_attention(self, stack: StackName, block: int, function: QueryAttention) -> Stream:
        """Return a copy of this `Stream` with one more function of a block's queries, whose result is added to the
        output of its attention.

        Args:
            stack: the block's stack.
            block: index of the block in its stack.
            function: of the queries, see `QueryAttention`. A `functools.partial` of a function and tensors is compiled
                once for all blocks.
        """
        key = (stack, block)
        functions = (*self.query_attention.get(key, ()), function)
        return replace(self, query_attention={**self.query_attention, key: functions})


class Network(Protocol):
    """Members of `FluxDiT` that extensions use."""

    @property
    def config(self) -> FluxDiTConfig:
        """Config of the network, a `FluxDiTConfig`."""

    @property
    def img_in(self) -> nn.Module:
        """Module that embeds image patches."""

    @property
    def txt_in(self) -> nn.Module:
        """Module that embeds hidden states of the text encoder."""

    @property
    def double_blocks(self) -> nn.ModuleList:
        """Blocks with separate weights for image and text, an `nn.ModuleList` in the order of the forward pass."""

    @property
    def single_blocks(self) -> nn.ModuleList:
        """Blocks over image and text together, an `nn.ModuleList` in the order of the forward pass."""

    def set_positions(self, stream: Stream, positions: Int[Tensor, "#b s axes"]) -> Stream:
        """Return a copy of `stream`, a `Stream`, with the same tokens at RoPE positions `positions`."""


Extension: TypeAlias = Callable[[Network, Stream], Stream]
"""Function that changes the inputs of the blocks; see the module's docstring."""


def with_image_tokens(
    dit: Network, stream: Stream, patches: Float[Tensor, "#b i c4"], positions: Int[Tensor, "i axes"]
) -> Stream:
    """Return a copy of `stream`, a `Stream`, with image tokens appended that are embedded from patches of latents and
    dropped at the end.

    Args:
        dit: the transformer.
        stream: inputs of its blocks.
        patches: latents as tokens, see `diffsynth_flux.flux1.dit.patchify`.
        positions: RoPE positions of the tokens, on the CPU.
    """
    tokens = dit.img_in(patches.to(stream.image.dtype)).to(stream.image.dtype).expand(len(stream.image), -1, -1)
    places = positions.expand(len(stream.positions), -1, -1)
    stream = replace(stream, image=torch.cat((stream.image, tokens), dim=1))
    return dit.set_positions(stream, torch.cat((stream.positions, places), dim=1))
