"""Sizes of weights, costs of stages and speeds of the machine: the input of the planner. All sizes are in bytes."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field, replace
from enum import Enum
from typing import Any

GIB = 2**30


def check_limit(name: str, limit: object) -> None:
    """Raise ValueError unless a limit of memory is None or a number of GiB of at least 0.

    Args:
        name: of the argument, for the message.
        limit: its value.
    """
    is_number = isinstance(limit, int | float) and not isinstance(limit, bool)
    if limit is not None and not (is_number and limit >= 0):
        raise ValueError(f"{name}={limit!r}: expected GiB of at least 0, or None for no limit")


"""Bytes of a GiB, the unit of `vram_limit` and `ram_limit`."""


class StageKind(Enum):
    """The kind of a stage of a call: before the loop, steps of the loop, or after it."""

    PREPARE = "prepare"
    DENOISE = "denoise"
    OUTPUT = "output"


@dataclass(frozen=True)
class BlockFootprint:
    """The size of the weights of one block.

    Args:
        name: dotted name of the block in its component.
        stored: bytes in the dtype in which the weights are stored and copied.
        computed: bytes in the dtype in which the block computes.
    """

    name: str
    stored: int
    computed: int


@dataclass(frozen=True)
class ComponentFootprint:
    """The size of the weights of one component.

    Args:
        role: name of the component in the pipeline.
        blocks: blocks in order of execution; each may be offloaded while it does not run.
        rest: bytes of weights and buffers outside blocks, in the dtype of computation. They are on the device as long
            as a stage of the component runs.
        rest_stored: bytes of the same in the dtype in which they are stored.
    """

    role: str
    blocks: tuple[BlockFootprint, ...]
    rest: int = 0
    rest_stored: int = 0

    @property
    def stored(self) -> int:
        """Size of the component's weights and buffers in the dtypes in which they are stored, in bytes."""
        return self.rest_stored + sum(block.stored for block in self.blocks)

    @property
    def whole(self) -> int:
        """Size of the component's weights and buffers on the device with every block there, in bytes."""
        return self.on_device({block.name for block in self.blocks}, slots=0)

    def on_device(self, resident: Collection[str], *, slots: int) -> int:
        """Return the device memory of the component during a stage, in bytes, an int: its weights and buffers outside
        blocks, the `resident` blocks, at most `slots` buffers of the size of the largest other block, and one block as
        computed with if dtypes differ.

        Args:
            resident: names of the blocks that stay on the device for the stage.
            slots: how many of the other blocks are on the device at once.

        Returns:
            The sum of the weights outside blocks, the resident blocks, the slots (each as large as the largest
            streamed block) and, where stored and computed dtypes differ, one block in the dtype of computation.
        """
        streamed = [block.stored for block in self.blocks if block.name not in resident]
        converted = max((block.computed for block in self.blocks if block.computed != block.stored), default=0)
        kept = sum(block.stored for block in self.blocks if block.name in resident)
        return self.rest + kept + min(slots, len(streamed)) * max(streamed, default=0) + converted


@dataclass(frozen=True)
class BlockCall:
    """One call of a block.

    Args:
        role: component of the block.
        block: name of the block in its component; empty for everything that ran outside of blocks.
        flops: floating-point operations of matrix products, convolutions and attention.
    """

    role: str
    block: str
    flops: int


@dataclass
class StageTrace:
    """Measurements of one stage in a run on the meta device; see `MetaTracer`.

    Args:
        name: name of the stage.
        device_bytes: peak of live bytes on the device, without weights.
        host_bytes: peak of live bytes in host memory.
        flops: floating-point operations of the whole stage.
        block_calls: calls of blocks in the order in which they ended.
    """

    name: str
    device_bytes: int = 0
    host_bytes: int = 0
    flops: int = 0
    block_calls: list[BlockCall] = field(default_factory=list)


@dataclass(frozen=True)
class StageCost:
    """The cost of one stage of a call: a part during which the same components run.

    Args:
        kind: its kind.
        name: name of the unit, or "denoise".
        roles: components that the stage runs.
        activations: peak of live bytes on the device beside weights, workspaces of kernels included.
        host_bytes: peak of live bytes in host memory.
        block_calls: calls of blocks in one step.
        steps: number of steps.
        switched_activations: `activations` with the arguments that the plan may set; None if nothing changes.
        switched_block_calls: `block_calls` with these arguments; empty if they are the same.
        is_switched: the figures are those with these arguments.
    """

    kind: StageKind
    name: str
    roles: tuple[str, ...]
    activations: int
    host_bytes: int = 0
    block_calls: tuple[BlockCall, ...] = ()
    steps: int = 1
    switched_activations: int | None = None
    switched_block_calls: tuple[BlockCall, ...] = ()
    is_switched: bool = False

    def switched(self) -> StageCost:
        """Return a `StageCost` of the same stage with the arguments that the plan may set, such as tiles of the
        autoencoder; the same object if they change nothing.
        """
        if self.switched_activations is None:
            return self
        return replace(
            self,
            activations=self.switched_activations,
            block_calls=self.switched_block_calls or self.block_calls,
            switched_activations=None,
            switched_block_calls=(),
            is_switched=True,
        )


@dataclass(frozen=True)
class Workload:
    """Sizes and costs of one call of a pipeline, with its weights stored in one way.

    Args:
        components: sizes of the components that the call uses.
        stages: costs of its stages, in running order.
        storage: name of the dtype in which weights are stored; empty for each tensor's own dtype.
        base_host_bytes: host memory of the process before it holds any weights.
        on_host: the device is the CPU, so weights and activations share host memory.
        switches: argument -> value of the arguments that lower the memory of some stages, and that a plan may set.
    """

    components: tuple[ComponentFootprint, ...]
    stages: tuple[StageCost, ...]
    storage: str = ""
    base_host_bytes: int = 0
    on_host: bool = False
    switches: Mapping[str, Any] = field(default_factory=dict)

    def switched(self) -> Workload:
        """Return a `Workload` of the same call with the arguments that the plan may set."""
        return replace(self, stages=tuple(stage.switched() for stage in self.stages))

    def component(self, role: str) -> ComponentFootprint:
        """Return the `ComponentFootprint` of the component whose role (name in the pipeline) is `role`; there must be
        one.
        """
        return next(component for component in self.components if component.role == role)


@dataclass(frozen=True)
class Speeds:
    """Speeds of the machine that times are predicted from.

    Args:
        link: copies from host memory to the device, in bytes/s.
        compute: computation, in FLOP/s.
        disk: reads from disk, in bytes/s.
        measured: whether `link` and `compute` were measured on this machine.
        source: one line on where the figures are from.
    """

    link: float
    compute: float
    disk: float
    measured: bool = False
    source: str = ""
