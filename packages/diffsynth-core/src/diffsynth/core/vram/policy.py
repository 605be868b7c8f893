"""Where weights are and in which dtype, state by state: the policy of a component."""

from __future__ import annotations

import enum
import itertools
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from diffsynth.core import device as devices
from diffsynth.errors import did_you_mean

DISK = "disk"
"""The device of weights that are read from their file whenever they are needed."""

PRESETS = ("none", "cpu-offload", "fp8", "dynamic", "disk")

AUTO = "auto"
"""The name of a choice between two presets, see `Auto`."""

FP8 = torch.float8_e4m3fn
"""What the preset "fp8" stores weights in."""


@dataclass(frozen=True)
class Auto:
    """A pipeline's plan chooses, when it is loaded: "dynamic", or "fp8" where its steps are predicted to be faster.

    It is chosen once, so that pictures do not depend on which calls came before.

    Args:
        call: the arguments of the call that it is chosen for; those left out have their defaults.
    """

    call: Mapping[str, Any] = field(default_factory=dict)


class BlockState(enum.Enum):
    """What a component, or a block of it, is doing."""

    OFFLOAD = "offload"
    """The component is not in the current stage."""
    ONLOAD = "onload"
    """Its stage runs; the block waits for its turn."""
    PREPARING = "preparing"
    """The block is kept ready on the device, if memory allows."""
    COMPUTATION = "computation"
    """The block runs."""


@dataclass(frozen=True)
class Placement:
    """A device, `"disk"` among them, and a dtype; None is each tensor's own."""

    device: str
    dtype: torch.dtype | None = None

    def __post_init__(self) -> None:
        if self.device == DISK and self.dtype is not None:
            raise ValueError(f"a placement on disk has the dtype of its file; got {self.dtype}")

    @property
    def on_disk(self) -> bool:
        """Whether nothing is in memory."""
        return self.device == DISK

    def __str__(self) -> str:
        dtype = "" if self.dtype is None else f"{str(self.dtype).removeprefix('torch.')}@"
        return f"{dtype}{self.device}"


@dataclass(frozen=True)
class Policy:
    """A placement for each state.

    What is computed never depends on how much memory there is: a block's weights pass the dtypes of all four states,
    whether it is kept ready or not. They are stored and moved in the narrowest of them.

    Raises:
        ValueError: computation on disk, a state that is further from the device than the one before it, a device that
            does not exist, a dtype that a device lacks.
    """

    offload: Placement
    onload: Placement
    preparing: Placement
    computation: Placement

    def __post_init__(self) -> None:
        if self.computation.on_disk:
            raise ValueError("computation_device='disk': expected a device that computes, such as 'cuda' or 'cpu'")
        device = devices.check_device(self.computation.device)
        ranks = {state: self._distance(getattr(self, state.value), device) for state in BlockState}
        for earlier, later in itertools.pairwise(BlockState):
            if ranks[later] > ranks[earlier]:
                raise ValueError(
                    f"{later.value} on {getattr(self, later.value).device} is further from {device} than "
                    f"{earlier.value} on {getattr(self, earlier.value).device}; expected disk, then cpu, then {device}"
                )
        for state in BlockState:
            placement: Placement = getattr(self, state.value)
            if placement.dtype is not None:
                devices.check_dtype(placement.dtype, placement.device)

    @property
    def device(self) -> torch.device:
        """Where computation happens."""
        return torch.device(self.computation.device)

    @property
    def keeps_ready(self) -> bool:
        """Whether blocks may stay on the device between their turns."""
        return not self.preparing.on_disk and _same(torch.device(self.preparing.device), self.device)

    def stored_dtype(self, own: torch.dtype) -> torch.dtype:
        """In which a floating tensor is kept and moved: the narrowest that it passes."""
        states = (self.offload, self.onload, self.preparing, self.computation)
        return min((state.dtype or own for state in states), key=lambda dtype: dtype.itemsize)

    def computed_dtype(self, own: torch.dtype) -> torch.dtype:
        """In which a floating tensor is used."""
        return self.computation.dtype or own

    @classmethod
    def preset(cls, name: str, device: torch.device | str, dtype: torch.dtype | None = None) -> Policy:
        """A usual policy by name.

        Args:
            name: "none" (always on the device), "cpu-offload" (in host memory; in its stage as much as the limit
                allows on the device), "dynamic" (the same; it says that a limit is wanted), "fp8" (the same, stored
                in float8_e4m3fn) or "disk" (in no memory; blocks are read when they are needed).
            device: where computation happens.
            dtype: of computation; None is each tensor's own.

        Raises:
            ValueError: an unknown name.
        """
        here = Placement(str(device), dtype)
        host = Placement("cpu", dtype)
        if name == "none":
            return cls(here, here, here, here)
        if name in ("cpu-offload", "dynamic"):
            return cls(host, host, here, here)
        if name == "fp8":
            return cls(Placement("cpu", FP8), Placement("cpu", FP8), Placement(str(device), FP8), here)
        if name == "disk":
            return cls(Placement(DISK), Placement(DISK), here, here)
        if name == AUTO:
            raise ValueError("policy 'auto' is for a pipeline, whose plan chooses: expected 'dynamic' or 'fp8' here")
        raise ValueError(unknown(name))

    @classmethod
    def from_keys(
        cls, keys: Mapping[str, Any], *, device: torch.device | str, dtype: torch.dtype | None
    ) -> Policy | None:
        """The policy that the eight keys of a `ModelConfig` spell; None if none of them is set.

        States after `offload` that are left out are filled: `computation` is the pipeline's device and dtype,
        `onload` and `preparing` are what `computation` is.

        Args:
            keys: `<state>_device` and `<state>_dtype`.
            device: of the pipeline.
            dtype: of the pipeline.

        Raises:
            ValueError: a hole: a key without its partner, or a later state without `offload`.
        """
        given = {name: value for name, value in keys.items() if value is not None}
        if not given:
            return None
        placements = {state: _placement(state, given) for state in BlockState}
        if placements[BlockState.OFFLOAD] is None:
            raise ValueError(
                f"{', '.join(given)} without offload_device and offload_dtype: say where the weights wait, for example "
                "offload_device='cpu', offload_dtype=torch.bfloat16"
            )
        computation = placements[BlockState.COMPUTATION] or Placement(str(device), dtype)
        return cls(
            placements[BlockState.OFFLOAD],
            placements[BlockState.ONLOAD] or computation,
            placements[BlockState.PREPARING] or computation,
            computation,
        )

    @staticmethod
    def _distance(placement: Placement, device: torch.device) -> int:
        if placement.on_disk:
            return 2
        here = devices.check_device(placement.device)
        if _same(here, device):
            return 0
        if here.type != "cpu":
            raise ValueError(f"weights on {here} for computation on {device}: expected disk, cpu or {device}")
        return 1


def unknown(name: str) -> str:
    """What to say of a policy's name that there is not."""
    names = (*PRESETS, AUTO)
    return f"policy {name!r} is unknown{did_you_mean(name, names)} Expected {', '.join(names)}"


def _same(one: torch.device, other: torch.device) -> bool:
    """Whether two devices are one; without an index it is the current one, which is the pipeline's."""
    return one.type == other.type and (one.index == other.index or None in (one.index, other.index))


def _placement(state: BlockState, given: Mapping[str, Any]) -> Placement | None:
    device_key, dtype_key = f"{state.value}_device", f"{state.value}_dtype"
    device, dtype = given.get(device_key), given.get(dtype_key)
    if device is None and dtype is None:
        return None
    if device is None or dtype is None:
        missing, there = (device_key, dtype_key) if device is None else (dtype_key, device_key)
        raise ValueError(f"{there}={given[there]!r} without {missing}: set both or neither")
    if (str(device) == DISK) != (dtype == DISK):
        raise ValueError(f"{device_key}={device!r} with {dtype_key}={dtype!r}: 'disk' goes with 'disk'")
    if dtype == DISK:
        return Placement(DISK)
    if not isinstance(dtype, torch.dtype):
        raise ValueError(f"{dtype_key}={dtype!r}: expected a torch dtype, or 'disk'")
    return Placement(str(device), dtype)
