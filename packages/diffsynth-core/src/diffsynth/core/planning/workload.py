"""Sizes of weights, costs of stages and speeds of the machine: the input of the planner. All sizes are in bytes."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, field, replace

GIB = 2**30
"""Bytes of a GiB, the unit of `vram_limit` and `ram_limit`."""


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
        name: name of the unit, or "denoise".
        roles: components that the stage runs.
        activations: peak of live bytes on the device beside weights, workspaces of kernels included.
        host_bytes: peak of live bytes in host memory.
        block_calls: calls of blocks in one step.
        steps: number of steps.
        tiled_activations: `activations` if the autoencoder works in tiles; None if it cannot, or if nothing changes.
        tiled_block_calls: `block_calls` if the autoencoder works in tiles; empty if they are the same.
        is_tiled: the figures are those of an autoencoder in tiles.
    """

    name: str
    roles: tuple[str, ...]
    activations: int
    host_bytes: int = 0
    block_calls: tuple[BlockCall, ...] = ()
    steps: int = 1
    tiled_activations: int | None = None
    tiled_block_calls: tuple[BlockCall, ...] = ()
    is_tiled: bool = False

    def with_tiles(self) -> StageCost:
        """Return a `StageCost` of the same stage with the autoencoder working in tiles (parts of the image or video);
        the same object if tiles change nothing.
        """
        if self.tiled_activations is None:
            return self
        return replace(
            self,
            activations=self.tiled_activations,
            block_calls=self.tiled_block_calls or self.block_calls,
            tiled_activations=None,
            tiled_block_calls=(),
            is_tiled=True,
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
        asks_for_tiles: the arguments of the call have the autoencoder work in tiles, whatever the limits are.
    """

    components: tuple[ComponentFootprint, ...]
    stages: tuple[StageCost, ...]
    storage: str = ""
    base_host_bytes: int = 0
    on_host: bool = False
    asks_for_tiles: bool = False

    def with_tiles(self) -> Workload:
        """Return a `Workload` of the same call with the autoencoder working in tiles (parts of the image or video) in
        all stages.
        """
        return replace(self, stages=tuple(stage.with_tiles() for stage in self.stages))

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
