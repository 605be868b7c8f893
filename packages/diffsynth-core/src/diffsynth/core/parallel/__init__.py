"""One result computed by several processes of `torch.distributed`, each with its own device.

`mesh` lays out the processes; `collectives` has the communication. Nothing here depends on a network: one that
distributes its tokens takes its shard, wraps its self-attention in `ulysses_attention`, and gathers the shards at the
end.
"""

from __future__ import annotations

from diffsynth.core.parallel.collectives import (
    all_gather_shards,
    compute_and_gather,
    shard_sizes,
    shard_slice,
    ulysses_attention,
)
from diffsynth.core.parallel.mesh import LONE_PROCESS, MeshAxis, ProcessMesh, create_mesh, init_distributed

__all__ = [
    "LONE_PROCESS",
    "MeshAxis",
    "ProcessMesh",
    "all_gather_shards",
    "compute_and_gather",
    "create_mesh",
    "init_distributed",
    "shard_sizes",
    "shard_slice",
    "ulysses_attention",
]
