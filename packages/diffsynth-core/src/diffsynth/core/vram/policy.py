"""Policies: on which device and in which dtype the weights of a component are, in each state."""

from __future__ import annotations

import enum
import itertools
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from diffsynth.core import device as devices
from diffsynth.errors import did_you_mean, shown

DISK = "disk"
"""The device name of weights that are read from their file whenever they are needed."""

PRESETS = ("none", "cpu-offload", "fp8", "dynamic", "disk")

AUTO = "auto"
"""The policy name for a choice between two presets; see `Auto`."""

FP8 = torch.float8_e4m3fn
"""The dtype in which the preset "fp8" stores weights."""


@dataclass(frozen=True)
class Auto:
    """A policy that is chosen when a pipeline is loaded: "dynamic", or "fp8" if its steps are predicted to be faster.

    It is chosen once, so that outputs do not depend on which calls came before.

    Args:
        call: arguments of the call that the policy is chosen for; the others have their defaults.

    Raises:
        TypeError: `call` is no mapping.
    """

    call: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not isinstance(self.call, Mapping):
            raise TypeError(f"call={shown(self.call)}: expected a dict argument -> value")


class BlockState(enum.Enum):
    """The states of a component or a block, from the furthest from the device to the nearest."""

    OFFLOAD = "offload"
    """The current stage does not use the component."""
    ONLOAD = "onload"
    """The stage of the component runs, and the block does not."""
    PREPARING = "preparing"
    """The block stays on the device between its calls, if memory allows."""
    COMPUTATION = "computation"
    """The block runs."""


@dataclass(frozen=True)
class Placement:
    """A device and a dtype of weights.

    Args:
        device: name of the device, or "disk".
        dtype: dtype of floating-point weights; None is each tensor's own.

    Raises:
        TypeError: a device that is no name, or a dtype that is no floating-point dtype.
        ValueError: a dtype with "disk".
    """

    device: str
    dtype: torch.dtype | None = None

    def __post_init__(self) -> None:
        if isinstance(self.device, torch.device):
            object.__setattr__(self, "device", str(self.device))
        if not isinstance(self.device, str):
            raise TypeError(f"device={shown(self.device)}: expected the name of a device, or 'disk'")
        if self.dtype is not None:
            devices.check_floating(self.dtype, "dtype", stored=True)
        if self.device == DISK and self.dtype is not None:
            raise ValueError(f"a placement on disk has the dtype of its file; got {self.dtype}")

    @property
    def on_disk(self) -> bool:
        """Whether the weights are on disk and in no memory, so that they are read whenever they are needed."""
        return self.device == DISK

    def __str__(self) -> str:
        dtype = "" if self.dtype is None else f"{str(self.dtype).removeprefix('torch.')}@"
        return f"{dtype}{self.device}"


@dataclass(frozen=True)
class Policy:
    """A placement of weights for each state.

    Outputs never depend on how much memory there is: weights are cast to the narrowest dtype of all four states,
    whether their block stays on the device or not. They are stored and copied in that dtype.

    Args:
        offload: placement while the current stage does not use the component.
        onload: placement while the stage runs and the block does not.
        preparing: placement between calls of the block, if memory allows.
        computation: placement while the block runs.

    Raises:
        ValueError: computation on disk, a state that is further from the device than the one before it, a device that
            does not exist, a dtype that a device does not support.
        TypeError: a state that is no `Placement`, or computation in a dtype of less than 16 bits.
    """

    offload: Placement
    onload: Placement
    preparing: Placement
    computation: Placement

    def __post_init__(self) -> None:
        for state in BlockState:
            if not isinstance(given := getattr(self, state.value), Placement):
                raise TypeError(f"{state.value}={shown(given)}: expected a Placement(device, dtype)")
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
                if state is BlockState.COMPUTATION:
                    devices.check_floating(placement.dtype, "computation_dtype")
                devices.check_dtype(placement.dtype, placement.device)

    @property
    def device(self) -> torch.device:
        """Device of computation, a `torch.device`."""
        return torch.device(self.computation.device)

    @property
    def allows_resident(self) -> bool:
        """Whether blocks may stay on the device of computation between their calls."""
        return not self.preparing.on_disk and _same(torch.device(self.preparing.device), self.device)

    def stored_dtype(self, own: torch.dtype) -> torch.dtype:
        """Return the dtype in which a tensor of floating-point dtype `own` is stored: the narrowest of the four states'
        dtypes, where a state without one has `own`.
        """
        states = (self.offload, self.onload, self.preparing, self.computation)
        return min((state.dtype or own for state in states), key=lambda dtype: dtype.itemsize)

    def computed_dtype(self, own: torch.dtype) -> torch.dtype:
        """Return the dtype in which a tensor of floating-point dtype `own` is computed with: the policy's, or `own` if
        it has none.
        """
        return self.computation.dtype or own

    @classmethod
    def preset(cls, name: str, device: torch.device | str, dtype: torch.dtype | None = None) -> Policy:
        """Return the `Policy` of preset `name` ("none", "cpu-offload", "dynamic", "fp8" or "disk") for computation on
        `device` in `dtype`; another name raises ValueError.

        Args:
            name: "none" (weights are always on the device), "cpu-offload" (they are in host memory, and during a stage
                on the device as far as the limit allows), "dynamic" (the same, with a limit), "fp8" (the same, stored
                in float8_e4m3fn) or "disk" (they are in no memory; blocks are read when they are needed).
            device: device of computation.
            dtype: dtype of computation; None is each tensor's own.

        Raises:
            ValueError: an unknown name, or "auto".
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
            raise ValueError("policy 'auto' is chosen by the plan of a pipeline; expected 'dynamic' or 'fp8' here")
        raise ValueError(unknown_policy(name))

    @classmethod
    def from_keys(
        cls, keys: Mapping[str, Any], *, device: torch.device | str, dtype: torch.dtype | None
    ) -> Policy | None:
        """Return the `Policy` of the eight placement keys (`offload_device`, `offload_dtype` and so on) in `keys`;
        states without keys are as `computation`, but a missing `offload` raises ValueError; None if no key is set.

        Missing states after `offload` are filled in: `computation` is the pipeline's device and dtype, `onload` and
        `preparing` are the same as `computation`.

        Args:
            keys: values of `<state>_device` and `<state>_dtype` by name.
            device: device of the pipeline.
            dtype: dtype of the pipeline; None is each tensor's own.

        Raises:
            ValueError: a device without a dtype, a dtype without a device, or a later state without `offload`.
        """
        given = {name: value for name, value in keys.items() if value is not None}
        if not given:
            return None
        placements = {state: _placement(state, given) for state in BlockState}
        offload = placements[BlockState.OFFLOAD]
        if offload is None:
            raise ValueError(
                f"{', '.join(given)} without offload_device and offload_dtype: set where the weights are stored, for "
                "example offload_device='cpu', offload_dtype=torch.bfloat16"
            )
        computation = placements[BlockState.COMPUTATION] or Placement(str(device), dtype)
        return cls(
            offload,
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


def unknown_policy(name: str) -> str:
    """Return the error message for an unknown policy `name`, a string with all known names and, if one is similar, a
    hint at it.
    """
    names = (*PRESETS, AUTO)
    near = did_you_mean(name, names) if isinstance(name, str) else ";"
    return f"policy {shown(name)} is unknown{near} Expected {', '.join(names)}"


def _same(one: torch.device, other: torch.device) -> bool:
    """Whether two devices are the same: of one type, and with equal indices or an index of None, which means the
    current device.
    """
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
    devices.check_floating(dtype, dtype_key, stored=state is not BlockState.COMPUTATION)
    return Placement(str(device), dtype)
