"""How long a step takes whose weights arrive while it computes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

_WARM_UP = 2
"""Steps after which the ring of slots has found its rhythm."""


@dataclass(frozen=True)
class BlockTiming:
    """One run of a block: seconds of computation, and of the copy that must be there before; 0 if it is resident."""

    compute: float
    copy: float = 0.0


def step_seconds(turns: Sequence[BlockTiming], *, slots: int) -> float:
    """Seconds per step in the long run, with one link, one device and `slots` places for blocks that come and go.

    A copy begins when the link is free and a slot is; a slot is free when the block that was in it has computed. A
    block computes when the one before it has, and its weights are there. Equal blocks that are all streamed therefore
    take `max(copy, compute)` each with two slots or more, and `copy + compute` with one.

    Args:
        turns: of one step, in order.
        slots: at least 1 if anything is streamed.

    Raises:
        ValueError: a block is streamed, and there is no slot for it.
    """
    streamed = sum(turn.copy > 0 for turn in turns)
    if streamed and slots < 1:
        raise ValueError(f"{streamed} blocks are streamed through {slots} slots; expected 1 or more")
    computed = link = 0.0
    freed: list[float] = []
    ends = []
    for _ in range(_WARM_UP + 2):
        for turn in turns:
            if turn.copy:
                slot = freed[-slots] if len(freed) >= slots else 0.0
                link = max(link, slot) + turn.copy
                computed = max(computed, link) + turn.compute
                freed.append(computed)
            else:
                computed += turn.compute
        ends.append(computed)
    return ends[-1] - ends[-2]
