"""Extensions: functions that change what enters the blocks of the Z-Image transformer, and what is added after them.

An extension is a callable `(dit, stream) -> stream`. The transformer runs three stacks of blocks: `noise_refiner` over
the tokens of the image, `context_refiner` over those of the caption, then `layers` over both. `ZImageDiT.forward`
applies its extensions in order, after the embedding and before the first block. An extension may change every field of
`Stream`: append image tokens, add to tokens, move them to other positions, mask them, change the time embedding, skip a
block, or register a residual that is added after a block. If it needs the refined tokens, it registers another
extension with `Stream.with_layers_extension`, which is applied after the refiners and before the first of `layers`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal, Protocol, TypeAlias, get_args

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from diffsynth_zimage.config import ZImageDiTConfig

Rotary: TypeAlias = tuple[Float[Tensor, "#b s half_d"], Float[Tensor, "#b s half_d"]]
"""Cosine and sine of the rotary angles of the tokens."""

TimeEmbed: TypeAlias = Float[Tensor, "b t"] | Float[Tensor, "b s t"]
"""Embedded time of each item of a batch, or of each of its tokens."""

Residual: TypeAlias = Callable[[Float[Tensor, "b s e"]], Float[Tensor, "b s e"]]
"""Function of the tokens after a block; its result is added to them."""

StackName: TypeAlias = Literal["noise_refiner", "context_refiner", "layers"]
"""Name of a stack of blocks, which is the name of its `ModuleList` in the transformer."""

STACKS: tuple[StackName, ...] = get_args(StackName)

BlockIndex: TypeAlias = tuple[StackName, int]
"""Name of a stack and index of a block in it."""


@dataclass(frozen=True, eq=False, kw_only=True)
class Stream:
    """Inputs of the blocks.

    Args:
        image: tokens of the image, row by row, then padding; refined by the noise refiner when extensions before the
            layers get them. Tokens that an extension appends are dropped at the end, like the padding.
        caption: tokens of the caption, then padding; refined by the context refiner when extensions before the layers
            get them.
        grid: rows and columns of image tokens, without padding.
        positions: RoPE positions (time, height, width) of the image's tokens, then of the caption's, on the CPU; set
            them with `ZImageDiT.set_positions`, which updates `rotary` too.
        rotary: cosine and sine of the rotary angles of the image's tokens, then of the caption's.
        time_embed: embedded time, one vector for all tokens or one for each, those of the image, then those of the
            caption.
        image_mask, caption_mask: which tokens the refiners attend to, True for attended; None means all.
        joint_mask: which tokens the layers attend to, those of the image, then those of the caption; None means all.
        residuals: stack and index of a block -> functions whose results are added to the tokens after it, in order.
        skip_blocks: stacks and indices of blocks that are skipped together with their residuals.
        caption_segments: for each item of the batch, the numbers of tokens of the caption's segments, without padding;
            one segment for networks other than that of Omni-Base.
        layers_extensions: extensions that are applied before the first of the layers, in order.
        step: context of the sampling step, set by the caller of `ZImageDiT.forward`; None outside of a sampling loop.
    """

    image: Float[Tensor, "b i e"]
    caption: Float[Tensor, "b c e"]
    grid: tuple[int, int]
    positions: Int[Tensor, "#b s axes"]
    rotary: Rotary
    time_embed: TimeEmbed
    image_mask: Bool[Tensor, "b 1 1 i"] | None = None
    caption_mask: Bool[Tensor, "b 1 1 c"] | None = None
    joint_mask: Bool[Tensor, "b 1 1 s"] | None = None
    residuals: Mapping[BlockIndex, tuple[Residual, ...]] = field(default_factory=dict)
    skip_blocks: frozenset[BlockIndex] = frozenset()
    caption_segments: tuple[tuple[int, ...], ...] = ()
    layers_extensions: tuple[Extension, ...] = ()
    step: Any = None

    @property
    def image_rotary(self) -> Rotary:
        """Tuple (cos, sin), tensors `#b i half_d`: the part of `rotary` for the image's tokens."""
        cos, sin = self.rotary
        count = self.image.shape[1]
        return cos[:, :count], sin[:, :count]

    @property
    def caption_rotary(self) -> Rotary:
        """Tuple (cos, sin), tensors `#b c half_d`: the part of `rotary` for the caption's tokens."""
        cos, sin = self.rotary
        count = self.image.shape[1]
        return cos[:, count:], sin[:, count:]

    @property
    def image_time_embed(self) -> TimeEmbed:
        """Tensor `b t` or `b i t`: the part of `time_embed` for the image's tokens."""
        return self.time_embed if self.time_embed.dim() == 2 else self.time_embed[:, : self.image.shape[1]]

    def joint_tokens(self) -> Float[Tensor, "b s e"]:
        """Return a new tensor `b s e`: the tokens of the image, then those of the caption, as they enter the layers."""
        return torch.cat((self.image, self.caption), dim=1)

    def with_residual(self, stack: StackName, block: int, residual: Residual) -> Stream:
        """Return a copy of this `Stream` with one more function for a block, whose result is added to the tokens after
        it.

        Args:
            stack: the block's stack. Residuals of a refiner are registered by extensions that are applied before it;
                `ZImageDiT.forward` refuses later ones.
            block: index of the block in its stack.
            residual: the function; it gets the tokens after the block and earlier residuals.
        """
        key = (stack, block)
        return replace(self, residuals={**self.residuals, key: (*self.residuals.get(key, ()), residual)})

    def with_layers_extension(self, extension: Extension) -> Stream:
        """Return a copy of this `Stream` with one more extension that is applied before the first of the layers, to the
        refined tokens.
        """
        return replace(self, layers_extensions=(*self.layers_extensions, extension))


class Network(Protocol):
    """Members of `ZImageDiT` that extensions use."""

    @property
    def config(self) -> ZImageDiTConfig:
        """Config of the network, a `ZImageDiTConfig`."""

    @property
    def noise_refiner(self) -> nn.ModuleList:
        """Blocks over the image's tokens, an `nn.ModuleList` in the order of the forward pass."""

    @property
    def context_refiner(self) -> nn.ModuleList:
        """Blocks over the caption's tokens, an `nn.ModuleList` in the order of the forward pass."""

    @property
    def layers(self) -> nn.ModuleList:
        """Blocks over all tokens, an `nn.ModuleList` in the order of the forward pass."""

    def set_positions(self, stream: Stream, positions: Int[Tensor, "#b s axes"]) -> Stream:
        """Return a copy of `stream`, a `Stream`, with the same tokens at RoPE positions `positions`."""


class OmniNetwork(Network, Protocol):
    """Members of `ZImageOmniDiT` that extensions use."""

    def append_references(
        self,
        stream: Stream,
        images: Sequence[Float[Tensor, "1 c h w"]],
        features: Sequence[Float[Tensor, "rows columns e"]],
    ) -> Stream:
        """Return a `Stream` with reference images and their features, which all items of the batch share."""


Extension: TypeAlias = Callable[[Network, Stream], Stream]
"""Function that changes the inputs of the blocks; see the module's docstring."""
