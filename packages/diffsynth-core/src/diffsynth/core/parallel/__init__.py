"""One result drawn by several processes of `torch.distributed`, each on a device of its own.

`team` says who draws with whom; `exchange` is what they pass to each other. Nothing here knows a network: one that
shares its tokens out takes its part, puts `attend_together` around its self-attention, and joins the parts in the end.
"""

from __future__ import annotations

from diffsynth.core.parallel.exchange import attend_together, compute_each, join_shares, share, shares
from diffsynth.core.parallel.team import ALONE, Ranks, Team, form_team, join_processes

__all__ = [
    "ALONE",
    "Ranks",
    "Team",
    "attend_together",
    "compute_each",
    "form_team",
    "join_processes",
    "join_shares",
    "share",
    "shares",
]
