"""The layout of the processes that compute one result: branches of guidance along one axis, tokens along the other."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import distributed

from diffsynth.core import device as devices
from diffsynth.errors import Refused, Unavailable

MAX_SEED = 2**63 - 1


@dataclass(frozen=True, eq=False)
class MeshAxis:
    """The processes along one axis of a mesh, as seen by this process.

    Args:
        group: process group of `torch.distributed`; None for a single process.
        index: position of this process along the axis.
        size: number of processes.
    """

    group: Any = None
    index: int = 0
    size: int = 1


LONE_PROCESS = MeshAxis()
"""An axis of one process, without communication."""


@dataclass(frozen=True, eq=False)
class ProcessMesh:
    """The processes that compute one result, as a table with one row per branch and one column per shard of the tokens.

    Args:
        branches: the processes with the same tokens as this one, for the branches of classifier-free guidance.
        tokens: the processes with the same branch as this one, for the shards of the tokens.
        world: all processes.
        device: the device of tensors that are communicated.
    """

    branches: MeshAxis = LONE_PROCESS
    tokens: MeshAxis = LONE_PROCESS
    world: MeshAxis = LONE_PROCESS
    device: torch.device | None = None

    @property
    def is_main_process(self) -> bool:
        """Whether this is the first process of the mesh, the one that shows progress and saves results."""
        return self.world.index == 0

    def check_call(self, *, branches: Sequence[str], step_cache: Any, cancel: Any) -> None:
        """Raise ValueError or Refused if arguments of a call would leave one process waiting for the others; else do
        nothing.

        Raises:
            ValueError: branches are distributed, but the call has more or fewer, or `cancel` is given, which processes
                could see at different steps.
            Refused: a step cache with distributed tokens, where each process would decide by its own tokens.
        """
        if self.branches.size not in (1, len(branches)):
            raise ValueError(
                f"the call computes the branches {', '.join(branches)} of guidance (with cfg_scale=1 only the first), "
                f"and pipe.parallel(cfg={self.branches.size}) gives one of {self.branches.size} to each process; "
                f"use guidance with as many branches, or call pipe.parallel(cfg=1)"
            )
        if self.world.size > 1 and cancel is not None:
            raise ValueError(
                "cancel: the other processes would wait for this one; leave it out, and stop all processes together"
            )
        if self.tokens.size > 1 and step_cache is not None:
            raise Refused(
                f"step_cache={step_cache!r} is refused: each process would decide by its own tokens; leave it out, or "
                f"distribute branches only with pipe.parallel(cfg=2)"
            )

    def broadcast_seeds(self, seeds: list[int | None]) -> list[int | None]:
        """Return a list of the first process's `seeds` in every process, with random ones for None; a single process
        returns `seeds` unchanged, None included.

        Noise must be equal in all processes.
        """
        if self.world.size == 1:
            return seeds
        values = [int(torch.randint(MAX_SEED, ())) if seed is None else seed for seed in seeds]
        shared = torch.tensor(values, dtype=torch.int64, device=self.device)
        distributed.broadcast(shared, src=0)
        return list(shared.tolist())


def init_distributed(device: torch.device | str | None = None) -> torch.device:
    """Initialise `torch.distributed`, unless it is initialised, make the accelerator of this process, if it uses one,
    the current device, and return its `torch.device` (`cuda:1`; `cpu` without an accelerator).

    Args:
        device: a kind of device ("cuda"), of which each process on a machine gets its own; or the device of this
            process with its index. None is the first accelerator, else the CPU.

    Raises:
        Unavailable: there is no process group and no launcher.
        ValueError: fewer devices than processes on this machine.
    """
    wanted = devices.default_device() if device is None else torch.device(device)
    if not distributed.is_available():
        raise Unavailable("this build of torch has no torch.distributed; install one that has, or use one process")
    if not distributed.is_initialized() and not distributed.is_torchelastic_launched():
        raise Unavailable(
            "there is no process group; start the script with `torchrun --nproc-per-node=<devices> script.py`, or call "
            "torch.distributed.init_process_group before"
        )
    if wanted.type != "cpu":
        index = wanted.index
        if index is None:
            index = distributed.get_node_local_rank(fallback_rank=_rank())
        wanted = devices.check_device(torch.device(wanted.type, index))
        torch.accelerator.set_device_index(wanted.index)
    if not distributed.is_initialized():
        distributed.init_process_group(devices.parse_nccl_backend(wanted.type))
    return wanted


def create_mesh(*, cfg: int = 1, sequence: int | None = None, device: torch.device | str | None = None) -> ProcessMesh:
    """Return a new `ProcessMesh`, a table of all processes with `cfg` rows (branches of guidance) and `sequence`
    columns (shards of the tokens; None: the number of processes divided by `cfg`). Every process must call it.

    Neighbouring ranks share tokens, because these communicate in every block of a network.

    Args:
        cfg: 2 distributes the two branches of guidance; 1 does not.
        sequence: number of processes that share the tokens of a branch; None is all that remain.
        device: see `init_distributed`.

    Raises:
        Unavailable: there is no process group.
        ValueError: `cfg * sequence` is not the number of processes.
    """
    if cfg not in (1, 2):
        raise ValueError(f"cfg={cfg!r}: guidance has 2 branches; expected 1 or 2")
    device = init_distributed(device)
    world_size = distributed.get_world_size()
    if sequence is None and world_size % cfg:
        raise ValueError(f"cfg={cfg} does not divide the {world_size} processes; start an even number of them")
    sequence = world_size // cfg if sequence is None else sequence
    # bool is an int in Python: sequence=True would pass as 1.
    if isinstance(sequence, bool) or not isinstance(sequence, int) or cfg * sequence != world_size:
        raise ValueError(
            f"cfg={cfg!r} times sequence={sequence!r} are not the {world_size} processes of torch.distributed; start "
            f"cfg * sequence processes, or leave sequence out"
        )
    rows = [[row * sequence + column for column in range(sequence)] for row in range(cfg)]
    columns = [list(column) for column in zip(*rows, strict=True)]
    return ProcessMesh(
        branches=_own_axis(columns),
        tokens=_own_axis(rows),
        world=_own_axis([list(range(world_size))]),
        device=device,
    )


def _own_axis(groups: list[list[int]]) -> MeshAxis:
    """Create process groups for the lists of ranks in `groups`, and return the `MeshAxis` of the list with this
    process; `LONE_PROCESS` if it is in none or alone in it.

    `new_group` is collective: every process must create all groups in the same order.
    """
    own = LONE_PROCESS
    for ranks in groups:
        if len(ranks) == 1:
            continue
        is_world = len(ranks) == distributed.get_world_size()
        group = distributed.group.WORLD if is_world else distributed.new_group(ranks)
        if _rank() in ranks:
            own = MeshAxis(group, ranks.index(_rank()), len(ranks))
    return own


def _rank() -> int:
    return int(distributed.get_rank()) if distributed.is_initialized() else 0
