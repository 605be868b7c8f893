"""The weights of a pipeline as a plan counts them: how each component's wait, and what that takes."""

from __future__ import annotations

import fnmatch
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from diffsynth.core import device as devices
from diffsynth.core.planning import BlockFootprint, ComponentFootprint
from diffsynth.core.vram.managed import ManagedModule
from diffsynth.core.vram.packing import Packing
from diffsynth.core.vram.policy import AUTO, FP8, PRESETS, Policy, unknown
from diffsynth.runtime.memory_options import architecture_of, partition_by


@dataclass(frozen=True)
class WeightStorage:
    """How the weights of a component wait.

    Args:
        dtype: that they are stored in; None is each tensor's own.
        on_disk: they are in no memory.
        is_open: a plan may choose `dtype`.
        held: the component is wrapped, and waits like this.
    """

    dtype: torch.dtype | None = None
    on_disk: bool = False
    is_open: bool = False
    held: ManagedModule | None = None

    @classmethod
    def under(cls, policy: Policy | None, dtype: torch.dtype, held: ManagedModule | None = None) -> WeightStorage:
        """What a policy means for weights that are computed with in `dtype`; None is no policy."""
        if policy is None:
            return cls()
        stored = policy.stored_dtype(dtype)
        return cls(stored if stored.itemsize < dtype.itemsize else None, policy.onload.on_disk, held=held)


def storages_under(policy: str, roles: Collection[str]) -> dict[str, WeightStorage]:
    """What a preset, or "auto", means for every role."""
    meant = {"fp8": WeightStorage(FP8), "disk": WeightStorage(on_disk=True), AUTO: WeightStorage(is_open=True)}
    return dict.fromkeys(roles, meant.get(policy, WeightStorage()))


def offered(storages: Mapping[str, WeightStorage], device: torch.device) -> list[dict[str, WeightStorage]]:
    """The ways that weights may wait, the one that changes no bit first; more than one only where a role is open."""
    fixed = {role: replace(each, is_open=False) for role, each in storages.items()}
    if not any(each.is_open for each in storages.values()) or not _may_round(device):
        return [fixed]
    return [fixed, {role: replace(fixed[role], dtype=FP8) if storages[role].is_open else fixed[role] for role in fixed}]


def storage_name(storages: Mapping[str, WeightStorage]) -> str:
    """Dtypes narrower than that of computation, with their roles unless it is one for all; empty if there are none."""
    roles: dict[str, list[str]] = {}
    for role, each in storages.items():
        if each.dtype is not None:
            roles.setdefault(str(each.dtype).removeprefix("torch."), []).append(role)
    return ", ".join(
        name if len(where) == len(storages) else f"{name} ({' '.join(where)})" for name, where in roles.items()
    )


def component_footprint(role: str, module: nn.Module, storages: WeightStorage) -> ComponentFootprint:
    """What the weights of a component take.

    Args:
        role: of it.
        module: on any device, meta included; only shapes and dtypes are read.
        waiting: see there.
    """
    if storages.held is not None:
        return storages.held.footprint(role)
    architecture = architecture_of(module)
    keeps = architecture.high_precision if architecture is not None else ()

    def packing(tensors: Mapping[str, Tensor]) -> Packing:
        dtypes = {name: (_kept(name, tensor, storages.dtype, keeps), tensor.dtype) for name, tensor in tensors.items()}
        return Packing(tensors, dtypes)

    blocks = []
    parts = partition_by(architecture, module)
    for block in parts.blocks:
        packed = packing(block.parameters())
        blocks.append(BlockFootprint(block.name, packed.stored_bytes, packed.computed_bytes))
    outside = packing(parts.rest)
    buffers = sum(buffer.numel() * buffer.element_size() for buffer in module.buffers())
    return ComponentFootprint(role, tuple(blocks), outside.computed_bytes + buffers, outside.stored_bytes + buffers)


def check_policy(policy: str | None, vram_limit: float | None, device: torch.device) -> None:
    """Refuse what no plan can be made for.

    Raises:
        ValueError: an unknown policy, one that a limit contradicts, or a dtype that the device lacks.
    """
    if policy is not None and policy not in (*PRESETS, AUTO):
        raise ValueError(unknown(policy))
    if policy == "none" and vram_limit is not None:
        raise ValueError(
            f"policy 'none' keeps everything on the device, whatever vram_limit={vram_limit} says; "
            "policy='dynamic' keeps a limit"
        )
    if vram_limit is not None and device.type == "cpu":
        raise ValueError(f"vram_limit={vram_limit}: the CPU has no memory of its own; limit ram_limit")


def _kept(name: str, tensor: Tensor, stored: torch.dtype | None, keeps: Sequence[str]) -> torch.dtype:
    if stored is None or not tensor.is_floating_point() or any(fnmatch.fnmatchcase(name, one) for one in keeps):
        return tensor.dtype
    return stored


def _may_round(device: torch.device) -> bool:
    """Whether the device reads what fp8 stores, and has a link that fewer bytes would cross faster."""
    if device.type == "cpu":
        return False
    try:
        devices.check_dtype(FP8, device)
    except ValueError:
        return False
    return True
