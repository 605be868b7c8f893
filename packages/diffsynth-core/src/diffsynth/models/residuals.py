"""Parts of transformers that extensions change: residuals after blocks, and the check of the blocks that they name."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from jaxtyping import Float
from torch import Tensor, nn

from diffsynth.errors import did_you_mean


@dataclass(frozen=True, eq=False)
class ScaledHint:
    """Residual that is the hint of a ControlNet, whatever the tokens are.

    Args:
        hint: of the shape of the tokens.
        scale: factor of the hint.
    """

    hint: Float[Tensor, "b s e"]
    scale: float

    def __call__(self, tokens: Float[Tensor, "b s e"]) -> Float[Tensor, "b s e"]:
        """Return the tensor that is added to the tokens."""
        return self.hint * self.scale


def hint_of(block: int, blocks: int, hints: int) -> int:
    """Return the index of the hint that a block of the transformer gets, an int: consecutive blocks share one.

    Args:
        block: index of the block.
        blocks: number of blocks in its stack.
        hints: number of hints for the stack, at least 1.
    """
    return block // -(-blocks // hints)


def check_blocks(network: nn.Module, named: Iterable[tuple[str, int]], stacks: Sequence[str]) -> None:
    """Raise ValueError if an extension names a block that a transformer does not have.

    Args:
        network: the transformer, with each stack of blocks as an attribute.
        named: (stack, index) of the blocks.
        stacks: names of its stacks.

    Raises:
        ValueError: an unknown stack, with the nearest spelling, or an index out of range.
    """
    for stack, index in named:
        if stack not in stacks:
            raise ValueError(
                f"an extension names the stack {stack!r}: expected one of {', '.join(stacks)}"
                f"{did_you_mean(stack, stacks)}"
            )
        if index not in range(len(getattr(network, stack))):
            raise ValueError(
                f"an extension names block {index} of {stack}, which has {len(getattr(network, stack))} blocks"
            )
