"""Memory plans: where the weights of each stage are, and what the stage costs. Sizes in bytes, times in seconds."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from diffsynth.core.planning.workload import Speeds, StageKind


@dataclass(frozen=True)
class ComponentPlan:
    """The location of a component's weights during a stage.

    Args:
        role: name of the component.
        resident: names of the blocks that stay on the device for the stage.
        streamed: names of the blocks that are copied to the device for each of their calls.
        slots: number of streamed blocks on the device at once.
        offloaded_to: where its weights are stored while they are not on the device: "host" or "disk"; "device" if they
            never leave it.
        stays_on_device: the component is on the device during all other stages, too.
    """

    role: str
    resident: tuple[str, ...]
    streamed: tuple[str, ...] = ()
    slots: int = 0
    offloaded_to: str = "host"
    stays_on_device: bool = False


@dataclass(frozen=True)
class StagePlan:
    """The plan of one stage.

    Args:
        kind: its kind.
        name: name of the unit, or "denoise".
        components: where the weights of the components are that the stage runs.
        activations: bytes on the device beside weights.
        vram: peak of bytes on the device, weights included.
        ram: peak of bytes of host memory of the process.
        bytes_once: bytes copied to the device when the stage begins.
        bytes_per_step: bytes copied to the device in each step.
        steps: number of steps.
        seconds_per_step: predicted time of a step; only matrix products, convolutions and attention are counted.
        switched: the arguments that the plan sets lower the memory of this stage.
        bytes_ahead: those of `bytes_once` that are copied while the stage before computes its last step.
    """

    kind: StageKind
    name: str
    components: tuple[ComponentPlan, ...]
    activations: int
    vram: int
    ram: int
    bytes_once: int
    bytes_per_step: int
    steps: int
    seconds_per_step: float
    switched: bool = False
    bytes_ahead: int = 0

    @property
    def roles(self) -> tuple[str, ...]:
        """Roles (names) of the components that the stage runs, a tuple of strings."""
        return tuple(component.role for component in self.components)


@dataclass(frozen=True)
class StorageOption:
    """The prediction for a call with its weights stored in one dtype.

    Args:
        storage: name of the dtype, or empty for each tensor's own dtype.
        seconds_per_step: predicted time of a step of the loop; 0 if the limits cannot be kept.
        bytes_per_step: bytes copied to the device in a step; 0 if the limits cannot be kept.
        reason: why the limits cannot be kept; empty if they can.
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
    """The plan of a whole call.

    Args:
        stages: plans of the stages, in running order.
        vram_limit: limit on device memory in GiB; None is no limit.
        ram_limit: limit on host memory in GiB; None is no limit.
        smallest_vram: smallest limit on device memory that can be kept, in bytes.
        smallest_ram: smallest limit on host memory that can be kept, in bytes.
        storage: name of the dtype in which weights are stored, or empty for each tensor's own dtype.
        evicted: roles of components that leave the device between stages.
        speeds: speeds that times are predicted from.
        switches: argument -> value that the plan sets to keep a limit, such as `{"tiled": True}`; empty if the limit
            can be kept without.
        options: predictions for each dtype that `storage` was chosen from, if there was a choice.
    """

    stages: tuple[StagePlan, ...]
    vram_limit: float | None
    ram_limit: float | None
    smallest_vram: int
    smallest_ram: int
    storage: str
    evicted: tuple[str, ...]
    speeds: Speeds
    switches: Mapping[str, Any] = field(default_factory=dict)
    options: tuple[StorageOption, ...] = ()

    @property
    def peak_vram(self) -> int:
        """Peak device memory over all stages, in bytes; 0 if the device is the CPU."""
        return max((stage.vram for stage in self.stages), default=0)

    @property
    def peak_ram(self) -> int:
        """Peak host memory over all stages, in bytes."""
        return max((stage.ram for stage in self.stages), default=0)

    @property
    def loop(self) -> tuple[StagePlan, ...]:
        """`StagePlan`s of the denoising loop, as a tuple: one for each run of steps that use the same components."""
        return tuple(stage for stage in self.stages if stage.kind is StageKind.DENOISE)

    @property
    def bytes_per_step(self) -> int:
        """Bytes copied to the device in each step of the denoising loop, in the stage that copies most; 0 without a
        loop.
        """
        return max((stage.bytes_per_step for stage in self.loop), default=0)

    @property
    def seconds_per_step(self) -> float:
        """Predicted time of a step of the denoising loop in its slowest stage, in seconds; 0.0 without a loop."""
        return max((stage.seconds_per_step for stage in self.loop), default=0.0)

    def to_dict(self) -> dict[str, Any]:
        """Return the plan as a dict name -> value of its fields, with nested plans as dicts in tuples, and of its
        properties except `loop`.
        """
        sums = ("peak_vram", "peak_ram", "bytes_per_step", "seconds_per_step")
        plain = dataclasses.asdict(self, dict_factory=_plain)
        return plain | {name: getattr(self, name) for name in sums}


def _plain(entries: list[tuple[str, Any]]) -> dict[str, Any]:
    return {name: value.value if isinstance(value, StageKind) else value for name, value in entries}
