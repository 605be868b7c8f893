"""Extensions: functions that change what enters the blocks of the Wan transformer.

An extension is a callable `(dit, stream) -> stream`. `WanDiT.forward` applies its extensions in order, after the
embedding and before the first block. An extension may change every field of `Stream`: prepend tokens, add to tokens,
move them in space and time, extend the context, change the modulation, replace the self-attention of a block, skip a
block, or register a residual that is added after a block. The variants in `diffsynth_wan.variants` are extensions.

An extension that supports sliding windows has a method `in_window(window)`, which returns the extension for one
`diffsynth.sampling.windows.Window` of the video; its feature declares `Condition(cut=in_window)`.

If the tokens of a video are sharded over several processes, the class attribute `token_scope: ClassVar[TokenScope]` of
an extension declares whether it needs all tokens or works on a shard of them; `diffsynth_wan.sharding` orders
extensions by it and refuses an extension without one.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import ClassVar, Literal, Protocol, TypeAlias

from jaxtyping import Float
from torch import Tensor, nn

from diffsynth.core.attention import attention
from diffsynth.runtime.feature import StepContext
from diffsynth_wan.config import WanDiTConfig

Rotary: TypeAlias = tuple[Float[Tensor, "#b s half_d"], Float[Tensor, "#b s half_d"]]
"""Cosine and sine of the rotary angles of the tokens."""

Attend: TypeAlias = Callable[
    [Float[Tensor, "b s n d"], Float[Tensor, "b s n d"], Float[Tensor, "b s n d"]], Float[Tensor, "b s n d"]
]
"""Self-attention of one block: a function of queries and keys after RoPE, and values."""

Residual: TypeAlias = Callable[[Float[Tensor, "b s e"]], Float[Tensor, "b s e"]]
"""Function of the tokens after a block; its result is added to them."""

Positions: TypeAlias = tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]
"""RoPE positions along time, height and width; their lengths are the size of the token grid."""

TokenScope: TypeAlias = Literal["whole", "part"]
"""Tokens that an extension gets: "whole" for all of them, before they are sharded over processes; "part" for those of
this process, where `Stream.split` takes the same shard of a tensor that the extension adds."""


def full_attention(block: int) -> Attend:
    """Return the function that computes a block's self-attention by default: every token attends to every token."""
    return attention


def _identity(x: Tensor) -> Tensor:
    return x


@dataclass(frozen=True, eq=False, kw_only=True)
class Stream:
    """Inputs of the blocks.

    Args:
        tokens: embedded latents of the whole grid, frame by frame; only those of this process after sharding.
        positions: RoPE positions of the grid; set them with `WanDiT.set_positions`, which updates `rotary` too.
        rotary: cosine and sine of the rotary angles of `tokens`.
        prefix_frames: frames of the grid before the video, such as reference images; their output is dropped.
        context: embedded prompt.
        image_context: embedded image; None for a network without an image branch.
        time: embedded noise level of each of `g` groups of consecutive tokens, all of one length: one group for the
            whole video, one per frame, or one per token.
        modulation: shift, scale and gate of self-attention and of feed-forward, before each block adds its own; fp32.
        attend: maps the index of a block to its self-attention.
        residuals: index of a block -> functions whose results are added to the tokens after it, in order.
        skip_blocks: indices of blocks that are skipped together with their residuals.
        split: takes this process's shard of a tensor along its tokens (axis 1), a contiguous slice.
        join: gathers the shards of all processes to the whole tensor.
        first_token: index in the grid of the first of `tokens`; may be above 0 after sharding.
        step: the step of the loop, with the networks of the pipeline; None for a network that is called by itself.
    """

    tokens: Float[Tensor, "b s e"]
    positions: Positions
    rotary: Rotary
    context: Float[Tensor, "b l e"]
    time: Float[Tensor, "b g e"]
    modulation: Float[Tensor, "b g 6 e"]
    image_context: Float[Tensor, "b i e"] | None = None
    prefix_frames: int = 0
    attend: Callable[[int], Attend] = full_attention
    residuals: Mapping[int, tuple[Residual, ...]] = field(default_factory=dict)
    skip_blocks: frozenset[int] = frozenset()
    split: Callable[[Tensor], Tensor] = _identity
    join: Callable[[Tensor], Tensor] = _identity
    first_token: int = 0
    step: StepContext | None = None

    @property
    def grid(self) -> tuple[int, int, int]:
        """Tuple (frames, rows, columns): the size of the grid of tokens, with the prefix frames (before the video)
        included.
        """
        time, height, width = self.positions
        return len(time), len(height), len(width)

    def with_residual(self, block: int, residual: Residual) -> Stream:
        """Return a copy of this `Stream` with one more function for `block`, whose result is added to the tokens after
        it.
        """
        return replace(self, residuals={**self.residuals, block: (*self.residuals.get(block, ()), residual)})


class Network(Protocol):
    """Members of `WanDiT` that extensions use."""

    @property
    def config(self) -> WanDiTConfig:
        """Config of the network, a `WanDiTConfig`."""

    @property
    def blocks(self) -> nn.ModuleList:
        """Transformer blocks of the network, an `nn.ModuleList` in the order of the forward pass."""

    @property
    def ref_conv(self) -> nn.Module:
        """Module that embeds the patches of a reference image; only if `config.reference_channels` is not 0."""

    @property
    def control_adapter(self) -> nn.Module:
        """Module that embeds camera rays; only if `config.camera_channels` is not 0."""

    def set_positions(self, stream: Stream, positions: Positions) -> Stream:
        """Return a copy of `stream`, a `Stream`, with the same tokens at RoPE positions `positions`."""


Extension: TypeAlias = Callable[[Network, Stream], Stream]
"""Function that changes the inputs of the blocks; see the module's docstring."""


@dataclass(frozen=True)
class FramePositions:
    """Extension that sets the time positions of the latent frames, for a window of a longer video.

    Apply it before extensions that prepend frames.
    """

    frames: tuple[int, ...]
    token_scope: ClassVar[TokenScope] = "whole"

    def __call__(self, dit: Network, stream: Stream) -> Stream:
        """Return the stream at these time positions; see `Extension`.

        Raises:
            ValueError: `frames` has another length than the latents.
        """
        time, height, width = stream.positions
        if len(self.frames) != len(time):
            raise ValueError(f"{len(self.frames)} frame positions are given for {len(time)} latent frames")
        return dit.set_positions(stream, (self.frames, height, width))
