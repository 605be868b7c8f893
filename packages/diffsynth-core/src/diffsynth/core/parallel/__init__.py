"""One result drawn by several processes of `torch.distributed`, each on a device of its own.

`mesh` says who draws with whom; `exchange` is what they pass to each other. Nothing here knows a network: one that
shares its tokens out takes its part, puts `attend_together` around its self-attention, and joins the parts in the end.
"""

from __future__ import annotations

from diffsynth.core.parallel.exchange import attend_together, compute_each, join_shares, share, shares
from diffsynth.core.parallel.mesh import ALONE, MeshAxis, ProcessMesh, form_mesh, join_processes

__all__ = [
    "ALONE",
    "MeshAxis",
    "ProcessMesh",
    "attend_together",
    "compute_each",
    "form_mesh",
    "join_processes",
    "join_shares",
    "share",
    "shares",
]
