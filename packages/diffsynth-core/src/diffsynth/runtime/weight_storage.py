"""The storage of a pipeline's weights as a plan counts it: dtype and place of each component, and its footprint."""

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
from diffsynth.core.vram.policy import AUTO, FP8, PRESETS, Policy, unknown_policy
from diffsynth.runtime.architectures import architecture_of, partition_by


@dataclass(frozen=True)
class WeightStorage:
    """The storage of the weights of a component while it is offloaded.

    Args:
        dtype: that floating weights are stored in; None is each tensor's own.
        on_disk: whether they are read from disk for each use, and take no memory.
        is_auto: whether a plan may choose `dtype`.
        wrapped: the wrapped component, whose own footprint counts; None for one that is not wrapped.
    """

    dtype: torch.dtype | None = None
    on_disk: bool = False
    is_auto: bool = False
    wrapped: ManagedModule | None = None

    @classmethod
    def under(cls, policy: Policy | None, dtype: torch.dtype, wrapped: ManagedModule | None = None) -> WeightStorage:
        """Return the `WeightStorage` of weights under `policy` that compute in `dtype`; `WeightStorage()` if it is
        None.
        """
        if policy is None:
            return cls()
        stored = policy.stored_dtype(dtype)
        return cls(stored if stored.itemsize < dtype.itemsize else None, policy.onload.on_disk, wrapped=wrapped)


def storages_under(policy: str, roles: Collection[str]) -> dict[str, WeightStorage]:
    """Return a dict role -> `WeightStorage`, equal for all roles: as "fp8", "disk" or "auto" say, else the default."""
    known = {"fp8": WeightStorage(FP8), "disk": WeightStorage(on_disk=True), AUTO: WeightStorage(is_auto=True)}
    return dict.fromkeys(roles, known.get(policy, WeightStorage()))


def storage_choices(storages: Mapping[str, WeightStorage], device: torch.device) -> list[dict[str, WeightStorage]]:
    """Return a list of one or two dicts role -> `WeightStorage`: `storages`, then, if a plan may choose for some role
    and the device converts float8, those with float8 for such roles; `is_auto` is False in both.
    """
    fixed = {role: replace(each, is_auto=False) for role, each in storages.items()}
    if not any(each.is_auto for each in storages.values()) or not _may_round(device):
        return [fixed]
    return [fixed, {role: replace(fixed[role], dtype=FP8) if storages[role].is_auto else fixed[role] for role in fixed}]


def storage_name(storages: Mapping[str, WeightStorage]) -> str:
    """Return the dtypes of rounded weights as text, with roles unless all: "float8_e4m3fn (dit)"; "" if none are."""
    roles: dict[str, list[str]] = {}
    for role, each in storages.items():
        if each.dtype is not None:
            roles.setdefault(str(each.dtype).removeprefix("torch."), []).append(role)
    return ", ".join(
        name if len(where) == len(storages) else f"{name} ({' '.join(where)})" for name, where in roles.items()
    )


def component_footprint(role: str, module: nn.Module, storage: WeightStorage) -> ComponentFootprint:
    """Return a component's `ComponentFootprint`: bytes of each block and of the rest, as stored and as computed with.

    Args:
        role: of the component.
        module: on any device, meta included; only shapes and dtypes are read.
        storage: see `WeightStorage`.
    """
    if storage.wrapped is not None:
        return storage.wrapped.footprint(role)
    architecture = architecture_of(module)
    exact = architecture.high_precision if architecture is not None else ()

    def packing(tensors: Mapping[str, Tensor]) -> Packing:
        dtypes = {name: (_stored(name, tensor, storage.dtype, exact), tensor.dtype) for name, tensor in tensors.items()}
        return Packing(tensors, dtypes)

    blocks = []
    cut = partition_by(architecture, module)
    for block in cut.blocks:
        packed = packing(block.parameters())
        blocks.append(BlockFootprint(block.name, packed.stored_bytes, packed.computed_bytes))
    outside = packing(cut.rest)
    buffers = sum(buffer.numel() * buffer.element_size() for buffer in module.buffers())
    return ComponentFootprint(role, tuple(blocks), outside.computed_bytes + buffers, outside.stored_bytes + buffers)


def check_policy(policy: str | None, vram_limit: float | None, device: torch.device) -> None:
    """Raise ValueError for an unknown policy, the policy "none" with a `vram_limit`, or a `vram_limit` on the CPU.

    Raises:
        ValueError: an unknown policy, one that a limit contradicts, or a limit on the CPU.
    """
    if policy is not None and policy not in (*PRESETS, AUTO):
        raise ValueError(unknown_policy(policy))
    if policy == "none" and vram_limit is not None:
        raise ValueError(
            f"policy 'none' keeps everything on the device, whatever vram_limit={vram_limit} says; "
            "policy='dynamic' keeps a limit"
        )
    if vram_limit is not None and device.type == "cpu":
        raise ValueError(f"vram_limit={vram_limit}: the CPU has no memory of its own; limit ram_limit")


def _stored(name: str, tensor: Tensor, dtype: torch.dtype | None, exact: Sequence[str]) -> torch.dtype:
    if dtype is None or not tensor.is_floating_point() or any(fnmatch.fnmatchcase(name, one) for one in exact):
        return tensor.dtype
    return dtype


def _may_round(device: torch.device) -> bool:
    """Whether float8 storage can make a device faster: it is not the CPU, and it converts float8."""
    if device.type == "cpu":
        return False
    try:
        devices.check_dtype(FP8, device)
    except ValueError:
        return False
    return True
