"""A plan: what is where, stage by stage, and what it costs. Sizes in bytes, times in seconds."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

from diffsynth.core.planning.workload import Speeds


@dataclass(frozen=True)
class ComponentPlan:
    """Where a component is in a stage.

    Args:
        role: of the component.
        resident: blocks that stay on the device for the stage.
        streamed: blocks that come and go.
        slots: places on the device for those.
        waits: where its weights are while they are not on the device: "host", "disk", or "device" if they never leave.
        stays: it is on the device in all other stages, too.
    """

    role: str
    resident: tuple[str, ...]
    streamed: tuple[str, ...] = ()
    slots: int = 0
    waits: str = "host"
    stays: bool = False


@dataclass(frozen=True)
class StagePlan:
    """One stage.

    Args:
        name: of the unit, or "denoise".
        residences: of the components it runs.
        activations: on the device beside weights.
        vram: the most that is on the device, weights included.
        ram: the most that the process takes of host memory.
        bytes_once: that go to the device when it begins.
        bytes_per_step: that go there in each step.
        steps: how many there are.
        seconds_per_step: in the long run; products of matrices, convolutions and attention alone are counted.
        tiled: the plan has the autoencoder work tile by tile here.
        bytes_ahead: of `bytes_once`, those that set out while the stage before computes its last step.
    """

    name: str
    components: tuple[ComponentPlan, ...]
    activations: int
    vram: int
    ram: int
    bytes_once: int
    bytes_per_step: int
    steps: int
    seconds_per_step: float
    tiled: bool = False
    bytes_ahead: int = 0

    @property
    def roles(self) -> tuple[str, ...]:
        """Components it runs."""
        return tuple(component.role for component in self.components)


@dataclass(frozen=True)
class StorageOption:
    """What a call would be with its weights stored in one dtype.

    Args:
        storage: the dtype's name, or empty for each tensor's own.
        seconds_per_step, bytes_per_step: predicted; 0 if the limits cannot be kept.
        reason: why they cannot be kept; empty if they can.
    """

    storage: str
    seconds_per_step: float = 0.0
    bytes_per_step: int = 0
    reason: str = ""

    def __str__(self) -> str:
        name = self.storage or "their own dtype"
        if self.reason:
            return f"{name}: does not fit"
        return f"{name}: {self.seconds_per_step:.3g} s and {self.bytes_per_step / 1e9:.2f} GB a step"


@dataclass(frozen=True)
class MemoryPlan:
    """A whole call.

    Args:
        stages: in running order.
        vram_limit: GiB that were asked for; None for no limit.
        ram_limit: GiB of host memory, likewise.
        smallest_vram: bytes below which nothing helps.
        smallest_ram: bytes of host memory, likewise.
        storage: dtype that weights wait in, or empty for their own.
        evicted: components that leave the device between stages.
        speeds: that times are predicted from.
        asks_for_tiles: the call has tiles by its own arguments, so they are none of the plan's.
        options: dtypes that `storage` was chosen from, if there was a choice.
    """

    stages: tuple[StagePlan, ...]
    vram_limit: float | None
    ram_limit: float | None
    smallest_vram: int
    smallest_ram: int
    storage: str
    evicted: tuple[str, ...]
    speeds: Speeds
    asks_for_tiles: bool = False
    options: tuple[StorageOption, ...] = ()

    @property
    def peak_vram(self) -> int:
        """Of all stages."""
        return max((stage.vram for stage in self.stages), default=0)

    @property
    def peak_ram(self) -> int:
        """Of all stages."""
        return max((stage.ram for stage in self.stages), default=0)

    @property
    def loop(self) -> tuple[StagePlan, ...]:
        """The stages of the denoising loop; more than one where experts take turns."""
        return tuple(stage for stage in self.stages if stage.name.startswith("denoise"))

    @property
    def bytes_per_step(self) -> int:
        """Of the slowest stage of the loop."""
        return max((stage.bytes_per_step for stage in self.loop), default=0)

    @property
    def seconds_per_step(self) -> float:
        """Of the slowest stage of the loop."""
        return max((stage.seconds_per_step for stage in self.loop), default=0.0)

    @property
    def tiled(self) -> bool:
        """Whether the plan turns tiles on: without them the call would not keep its limit."""
        return any(stage.tiled for stage in self.stages)

    def to_dict(self) -> dict[str, Any]:
        """Plain values, with the sums."""
        sums = ("peak_vram", "peak_ram", "bytes_per_step", "seconds_per_step", "tiled")
        return dataclasses.asdict(self) | {name: getattr(self, name) for name in sums}
