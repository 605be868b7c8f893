"""Where a variant of Wan joins the network: the stream as it is about to enter the blocks.

An extension is a callable `(dit, stream) -> stream`. `WanDiT.forward` applies those it is given, in order, between
embedding and blocks. What an extension can do is what `Stream` holds: put tokens in front, add to them, move them in
space and time, add a context, change the modulation, replace the attention of a block, leave a block out, or leave a
function that adds a residual behind one. Each variant of `diffsynth_wan.variants` is such a callable. Those that a long
video may have have a method `in_window(window)` too, which gives the extension for a `diffsynth_wan.windows.Window` of
it.

Where several processes share a video, each has a part of the tokens. An extension says with a class attribute
`sees: ClassVar[Sees]` on which side of that it stands; `diffsynth_wan.sharing` puts them in order and refuses one that
does not say.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, ClassVar, Literal, TypeAlias

from jaxtyping import Float
from torch import Tensor

from diffsynth.core.attention import attention

if TYPE_CHECKING:
    from diffsynth_wan.dit import WanDiT

Rotary: TypeAlias = tuple[Float[Tensor, "#b s half_d"], Float[Tensor, "#b s half_d"]]
"""Cosine and sine of the angles that turn queries and keys."""

Attend: TypeAlias = Callable[
    [Float[Tensor, "b s n d"], Float[Tensor, "b s n d"], Float[Tensor, "b s n d"]], Float[Tensor, "b s n d"]
]
"""Self-attention of one block, of turned queries, turned keys, and values."""

Residual: TypeAlias = Callable[[Float[Tensor, "b s e"]], Float[Tensor, "b s e"]]
"""What is added to the tokens behind a block, from the tokens as they are there."""

Positions: TypeAlias = tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]
"""Where the tokens stand along time, height and width; their numbers are the grid of tokens."""


Sees: TypeAlias = Literal["whole", "part"]
"""The stream before its tokens are shared out, free to change it; or behind, where `Stream.split` takes this process's
part of what is added."""


def attend_plainly(block: int) -> Attend:
    """Every token attends to every token, in all blocks."""
    return attention


def _same(x: Tensor) -> Tensor:
    return x


@dataclass(frozen=True, eq=False, kw_only=True)
class Stream:
    """What enters the blocks.

    Args:
        tokens: of the whole grid, frame by frame; behind `split` those of this process.
        positions: of the grid of tokens; `WanDiT.place` changes them together with `rotary`.
        rotary: of the tokens.
        lead: frames in front of the video, which are dropped in the end.
        context: embedded prompt.
        image_context: embedded image; None for a network without an image branch.
        time: embedded noise level, of each of `g` equal runs of tokens: of all tokens, of each frame, or of each.
        modulation: shift, scale and gate of attention and of feed-forward, before a block adds its own; fp32.
        attend: block -> its self-attention.
        residuals: block -> functions whose results are added behind it, in order.
        skip_blocks: that are left out, with what stands behind them.
        split: takes this process's part of a tensor along its tokens, axis 1, where several processes share a video;
            it is one run of tokens.
        join: the opposite: the whole, from the parts.
        first: where in the grid the first of `tokens` stands; not 0 behind `split`.
    """

    tokens: Float[Tensor, "b s e"]
    positions: Positions
    rotary: Rotary
    context: Float[Tensor, "b l e"]
    time: Float[Tensor, "b g e"]
    modulation: Float[Tensor, "b g 6 e"]
    image_context: Float[Tensor, "b i e"] | None = None
    lead: int = 0
    attend: Callable[[int], Attend] = attend_plainly
    residuals: Mapping[int, tuple[Residual, ...]] = field(default_factory=dict)
    skip_blocks: frozenset[int] = frozenset()
    split: Callable[[Tensor], Tensor] = _same
    join: Callable[[Tensor], Tensor] = _same
    first: int = 0

    @property
    def grid(self) -> tuple[int, int, int]:
        """Frames, rows and columns of tokens, with those in front of the video."""
        time, height, width = self.positions
        return len(time), len(height), len(width)

    def with_residual(self, block: int, residual: Residual) -> Stream:
        """This stream, with one more residual behind `block`."""
        return replace(self, residuals={**self.residuals, block: (*self.residuals.get(block, ()), residual)})


Extension: TypeAlias = Callable[["WanDiT", Stream], Stream]
"""See the module."""


@dataclass(frozen=True)
class FramesAt:
    """The latents are a window of a longer video: where each of their frames stands in it.

    Stands before extensions that put frames in front.
    """

    frames: tuple[int, ...]
    sees: ClassVar[Sees] = "whole"

    def __call__(self, dit: WanDiT, stream: Stream) -> Stream:
        """See `Extension`.

        Raises:
            ValueError: another number of frames than the latents have.
        """
        time, height, width = stream.positions
        if len(self.frames) != len(time):
            raise ValueError(f"{len(self.frames)} places are given for {len(time)} frames of latents")
        return dit.place(stream, (self.frames, height, width))
