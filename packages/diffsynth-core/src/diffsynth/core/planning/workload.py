"""What a call needs: sizes of weights, and what its stages take beside them. All sizes in bytes."""

from __future__ import annotations

from dataclasses import dataclass, replace


@dataclass(frozen=True)
class BlockFootprint:
    """The weights of a block.

    Args:
        name: in its component.
        stored: as they wait and move.
        computed: as they are computed with.
    """

    name: str
    stored: int
    computed: int


@dataclass(frozen=True)
class ComponentFootprint:
    """The weights of a component.

    Args:
        role: in the pipeline.
        blocks: in order of execution; each may be away while it does not run.
        rest: what is on the device as long as the component's stage runs, as it is computed with.
        rest_stored: the same as it waits.
    """

    role: str
    blocks: tuple[BlockFootprint, ...]
    rest: int = 0
    rest_stored: int = 0

    @property
    def stored(self) -> int:
        """All of it as it waits."""
        return self.rest_stored + sum(block.stored for block in self.blocks)

    @property
    def whole(self) -> int:
        """All of it on the device, none of it converted ahead."""
        return self.on_device({block.name for block in self.blocks}, slots=0)

    def on_device(self, resident: set[str] | frozenset[str], *, slots: int) -> int:
        """What it takes there in its stage: the rest, resident blocks, a ring of slots, and a converted block."""
        streamed = [block.stored for block in self.blocks if block.name not in resident]
        converted = max((block.computed for block in self.blocks if block.computed != block.stored), default=0)
        kept = sum(block.stored for block in self.blocks if block.name in resident)
        return self.rest + kept + min(slots, len(streamed)) * max(streamed, default=0) + converted


@dataclass(frozen=True)
class BlockCall:
    """One run of a block, or of what stands between blocks (an empty name)."""

    role: str
    block: str
    flops: int


@dataclass(frozen=True)
class StageCost:
    """A part of a call during which the same components are used.

    Args:
        name: of the unit, or "denoise".
        roles: components it runs.
        activations: the most that is alive on the device beside weights, workspaces of kernels included.
        host: the same in host memory.
        runs: of blocks, in one step.
        steps: how often those repeat.
        tiled: `activations` if the autoencoder works tile by tile; None if it cannot, or if that changes nothing.
        tiled_runs: `runs` then.
        in_tiles: it does.
    """

    name: str
    roles: tuple[str, ...]
    activations: int
    host: int = 0
    runs: tuple[BlockCall, ...] = ()
    steps: int = 1
    tiled: int | None = None
    tiled_runs: tuple[BlockCall, ...] = ()
    in_tiles: bool = False

    def cut(self) -> StageCost:
        """The same where the autoencoder works tile by tile."""
        if self.tiled is None:
            return self
        runs = self.tiled_runs or self.runs
        return replace(self, activations=self.tiled, runs=runs, tiled=None, tiled_runs=(), in_tiles=True)


@dataclass(frozen=True)
class Workload:
    """A call.

    Args:
        components: that it uses.
        stages: in running order.
        storage: how weights wait: a dtype's name, or empty for each tensor's own.
        base: host memory of the process before it holds any weights.
        on_host: the device is the host: weights and activations share its memory.
        asks_for_tiles: the call itself has the autoencoder work tile by tile, whatever memory there is.
    """

    components: tuple[ComponentFootprint, ...]
    stages: tuple[StageCost, ...]
    storage: str = ""
    base: int = 0
    on_host: bool = False
    asks_for_tiles: bool = False

    def cut(self) -> Workload:
        """The same call with tiles: one argument of it, so all stages have them or none."""
        return replace(self, stages=tuple(stage.cut() for stage in self.stages))

    def component(self, role: str) -> ComponentFootprint:
        """By role."""
        return next(component for component in self.components if component.role == role)


@dataclass(frozen=True)
class Speeds:
    """What times are predicted from.

    Args:
        link: bytes/s from host memory to the device.
        compute: FLOP/s.
        disk: bytes/s.
        measured: whether link and compute were measured on this machine.
        source: one line on where the figures are from.
    """

    link: float
    compute: float
    disk: float
    measured: bool = False
    source: str = ""
