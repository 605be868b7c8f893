"""Who draws with whom: the processes that share a guidance's branches, and those that share the tokens of a branch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import distributed

from diffsynth.core import device as devices
from diffsynth.errors import Refused, Unavailable

MAX_SEED = 2**63 - 1


@dataclass(frozen=True, eq=False)
class MeshAxis:
    """Processes that share one thing out among themselves.

    Args:
        group: of `torch.distributed`; None where one process has it all.
        index: of this process among them.
        size: how many they are.
    """

    group: Any = None
    index: int = 0
    size: int = 1


ALONE = MeshAxis()
"""One process has it all."""


@dataclass(frozen=True, eq=False)
class ProcessMesh:
    """The processes that draw one result, as a table: a row for each branch, a column for each part of the tokens.

    Args:
        branches: those that have this process's tokens, in other branches of classifier-free guidance.
        tokens: those that have this process's branch, and other tokens.
        everybody: both.
        device: for what the processes tell each other.
    """

    branches: MeshAxis = ALONE
    tokens: MeshAxis = ALONE
    everybody: MeshAxis = ALONE
    device: torch.device | None = None

    @property
    def is_first(self) -> bool:
        """Whether this process speaks for all: it alone shows progress."""
        return self.everybody.index == 0

    def check_call(self, *, cfg_scale: float, step_cache: Any, cancel: Any) -> None:
        """Refuse what would leave a process waiting for the others.

        Raises:
            ValueError: there are no branches to share, or `cancel` is given, which one process would see and another
                would not.
            Refused: a step cache, where each process would decide by its own tokens.
        """
        if self.branches.size > 1 and cfg_scale == 1:
            raise ValueError(
                f"cfg_scale={cfg_scale} has one branch, and pipe.parallel(cfg={self.branches.size}) gives each of "
                f"{self.branches.size} branches to a process; guide, or call pipe.parallel(cfg=1)"
            )
        if self.everybody.size > 1 and cancel is not None:
            raise ValueError("cancel: the other processes would wait for this one; leave it out and end them together")
        if self.tokens.size > 1 and step_cache is not None:
            raise Refused(
                f"step_cache={step_cache!r} is refused: each process would decide by the tokens that it has; leave it "
                f"out, or share branches alone with pipe.parallel(cfg=2)"
            )

    def agreed_seeds(self, seeds: list[int | None]) -> list[int | None]:
        """The seeds of the first process, with one drawn where there was none: noise must be the same everywhere."""
        if self.everybody.size == 1:
            return seeds
        drawn = [int(torch.randint(MAX_SEED, ())) if seed is None else seed for seed in seeds]
        agreed = torch.tensor(drawn, dtype=torch.int64, device=self.device)
        distributed.broadcast(agreed, src=0)
        return list(agreed.tolist())


def join_processes(device: torch.device | str | None = None) -> torch.device:
    """Take part in `torch.distributed`, if this process does not yet, and tell which device is this process's.

    Args:
        device: a kind of device, of which each process on a machine gets its own; or this process's with its number.
            None picks the first accelerator, else the CPU.

    Raises:
        Unavailable: nobody said which processes there are.
        ValueError: fewer devices than processes on this machine.
    """
    wanted = devices.default_device() if device is None else torch.device(device)
    if not distributed.is_available():
        raise Unavailable("this build of torch has no torch.distributed; install one that has, or draw in one process")
    if not distributed.is_initialized() and not distributed.is_torchelastic_launched():
        raise Unavailable(
            "there is no process group; start the script with `torchrun --nproc-per-node=<devices> script.py`, or call "
            "torch.distributed.init_process_group before"
        )
    if wanted.type != "cpu":
        number = wanted.index
        if number is None:
            number = distributed.get_node_local_rank(fallback_rank=_rank())
        wanted = devices.check_device(torch.device(wanted.type, number))
        torch.accelerator.set_device_index(wanted.index)
    if not distributed.is_initialized():
        distributed.init_process_group(devices.parse_nccl_backend(wanted.type))
    return wanted


def form_mesh(*, cfg: int = 1, sequence: int | None = None, device: torch.device | str | None = None) -> ProcessMesh:
    """Lay the processes of `torch.distributed` out in `cfg` rows of `sequence`. Every process must call it.

    Processes with neighbouring numbers share tokens, because those talk to each other in every block.

    Args:
        cfg: 2 gives each branch of guidance processes of its own; 1 does not.
        sequence: how many processes share the tokens of a branch; None is all that there are for it.
        device: see `join_processes`.

    Raises:
        Unavailable: there is no process group.
        ValueError: sizes that do not make up the number of processes.
    """
    if cfg not in (1, 2):
        raise ValueError(f"cfg={cfg!r}: guidance has 2 branches; expected 1 or 2")
    device = join_processes(device)
    world = distributed.get_world_size()
    if sequence is None and world % cfg:
        raise ValueError(f"cfg={cfg} does not divide the {world} processes; start an even number of them")
    sequence = world // cfg if sequence is None else sequence
    if isinstance(sequence, bool) or not isinstance(sequence, int) or cfg * sequence != world:
        raise ValueError(
            f"cfg={cfg!r} times sequence={sequence!r} are not the {world} processes of torch.distributed; start as "
            f"many as you share among, or leave sequence out"
        )
    rows = [[row * sequence + column for column in range(sequence)] for row in range(cfg)]
    columns = [list(column) for column in zip(*rows, strict=True)]
    everybody = _ranks([list(range(world))])
    return ProcessMesh(branches=_ranks(columns), tokens=_ranks(rows), everybody=everybody, device=device)


def _ranks(groups: list[list[int]]) -> MeshAxis:
    """This process's, of groups that every process must name in the same order."""
    own = ALONE
    for members in groups:
        if len(members) == 1:
            continue
        everybody = len(members) == distributed.get_world_size()
        group = distributed.group.WORLD if everybody else distributed.new_group(members)
        if _rank() in members:
            own = MeshAxis(group, members.index(_rank()), len(members))
    return own


def _rank() -> int:
    return int(distributed.get_rank()) if distributed.is_initialized() else 0
