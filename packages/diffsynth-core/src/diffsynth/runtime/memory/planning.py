"""What a call would take: the pipeline's own code, run on meta, and a budget over what was seen."""

from __future__ import annotations

import fnmatch
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from itertools import groupby, pairwise
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from diffsynth import _env
from diffsynth.core import device as devices
from diffsynth.core.device.memory import memory_in_use
from diffsynth.core.device.speed import compute_speed, disk_speed, link_speed
from diffsynth.core.vram.budget import (
    BlockLoad,
    ComponentLoad,
    MemoryPlan,
    Run,
    Speeds,
    StageLoad,
    Workload,
    plan_memory,
)
from diffsynth.core.vram.managed import ManagedModule, managed
from diffsynth.core.vram.packing import Packing
from diffsynth.core.vram.placement import PRESETS
from diffsynth.core.vram.rehearsal import Rehearsal, Stage
from diffsynth.errors import did_you_mean
from diffsynth.runtime.memory.placing import architecture_of, partition_by
from diffsynth.runtime.memory.stand_ins import StandInTokenizer, declared_components, without_weights
from diffsynth.runtime.progress import progress_bar
from diffsynth.runtime.request import Request
from diffsynth.runtime.unit import Unit, run_units
from diffsynth.spec import resolve

if TYPE_CHECKING:
    from diffsynth._models import ModelRecord
    from diffsynth.runtime.pipeline import Pipeline

PROMPT_TOKENS = 512
"""Of a prompt that is not given: more than most have."""

_REHEARSED_STEPS = 2
"""The second step finds what the first left behind; from then on they are alike."""

_WORTH_A_STAGE = 16 * 2**20
"""Bytes from which a unit without a network has a line of its own."""


def plan_call(
    pipe: Pipeline,
    arguments: Mapping[str, Any],
    *,
    device: torch.device | str,
    vram_limit: float | None = None,
    ram_limit: float | None = None,
    policy: str | None = None,
    prompt_tokens: int = PROMPT_TOKENS,
) -> MemoryPlan:
    """The plan of one call of a pipeline.

    Args:
        pipe: with its components, on any device, meta included; they are only looked at.
        arguments: of the call. Without a prompt a text of `prompt_tokens` tokens is assumed.
        device: that the call is meant for. It need not be here: then its speed is assumed.
        vram_limit, ram_limit: GiB; see `plan_memory`.
        policy: a preset's name; None is "dynamic" with a limit and "none" without.
        prompt_tokens: see above.

    Raises:
        TypeError, ValueError: an argument that the call would refuse, too.
        NotEnoughMemory: a limit cannot be kept; the message has the smallest that can.
        Unplannable: the pipeline's code asks for values that only a real run has.
    """
    device = torch.device(device)
    stored = _storage(policy, vram_limit, device)
    base = _base(pipe)
    twin = _on_meta(pipe, arguments, prompt_tokens)
    modules = {role: part for role, part in twin.components.items() if isinstance(part, nn.Module)}
    wrapped = {role: managed(pipe.components[role]) for role in modules}
    blocks = {role: _blocks(module, wrapped[role]) for role, module in modules.items()}
    stages = _rehearse(twin, arguments, modules, blocks, device.type)
    could_tile = "tiled" in twin.__signature__.parameters and not twin.__signature__.parameters["tiled"].default
    if could_tile and "tiled" not in arguments and vram_limit is not None:
        tiled = _rehearse(twin, {**arguments, "tiled": True}, modules, blocks, device.type)
        stages = [_with_tiles(*pair) for pair in zip(stages, tiled, strict=True)]
    components = tuple(
        _component(role, module, stored) if (held := wrapped[role]) is None else held.load(role)
        for role, module in modules.items()
    )
    workload = Workload(
        components,
        tuple(stages),
        storage="" if stored is None else str(stored).removeprefix("torch."),
        base=base,
        on_host=device.type == "cpu",
    )
    return plan_memory(
        workload,
        vram_limit=vram_limit,
        ram_limit=ram_limit,
        speeds=_speeds(device, twin.dtype),
        offloads=policy not in (None, "none"),
        disk=tuple(modules) if policy == "disk" else (),
    )


def plan_model(
    record: ModelRecord,
    arguments: Mapping[str, Any],
    *,
    device: torch.device | str | None = None,
    dtype: str = "bfloat16",
    **limits: Any,
) -> MemoryPlan:
    """The plan of one call of a model that need not be here: no weights are read, and no device is used.

    Args:
        record: of the model.
        arguments: of the call.
        device: None is the first accelerator, and where there is none the kind that is preferred.
        dtype: name of a torch dtype, of weights and activations.
        limits: as of `plan_call`; so are the errors.
    """
    if device is None:
        device = devices.default_device()
        device = devices.ACCELERATORS[0] if device.type == "cpu" else device
    torch_dtype: torch.dtype = getattr(torch, dtype)
    cls: type[Pipeline] = resolve(record.pipeline)
    components = dict.fromkeys(cls.roles) | declared_components(record, torch_dtype)
    pipe = cls(components, device="meta", torch_dtype=torch_dtype).named(record.name, record.defaults)
    return plan_call(pipe, arguments, device=device, **limits)


def _storage(policy: str | None, vram_limit: float | None, device: torch.device) -> torch.dtype | None:
    """The dtype that weights wait in; None is their own.

    Raises:
        ValueError: an unknown policy, or one that a limit contradicts.
    """
    if policy is not None and policy not in PRESETS:
        raise ValueError(f"policy {policy!r} is unknown{did_you_mean(policy, PRESETS)} Expected {', '.join(PRESETS)}")
    if policy == "none" and vram_limit is not None:
        raise ValueError(f"policy 'none' keeps everything on the device, whatever vram_limit={vram_limit} says")
    if vram_limit is not None and device.type == "cpu":
        raise ValueError(f"vram_limit={vram_limit}: the CPU has no memory of its own; limit ram_limit")
    return torch.float8_e4m3fn if policy == "fp8" else None


def _base(pipe: Pipeline) -> int:
    """Host memory of this process without the pipeline's weights; 0 where nobody can tell."""
    tensors = {
        tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes()
        for part in pipe.components.values()
        if isinstance(part, nn.Module)
        for tensor in (*part.parameters(), *part.buffers())
        if tensor.device.type == "cpu"
    }
    return max((memory_in_use("cpu") or 0) - sum(tensors.values()), 0)


def _on_meta(pipe: Pipeline, arguments: Mapping[str, Any], prompt_tokens: int) -> Pipeline:
    """The same pipeline without weights, its device meta."""
    components: dict[str, Any] = {}
    for role, part in pipe.components.items():
        if isinstance(part, nn.Module):
            components[role] = without_weights(part, pipe.dtype)
        elif "tokenizer" in role and ("prompt" not in arguments or part is None):
            components[role] = StandInTokenizer(prompt_tokens)
        else:
            components[role] = part
    twin = type(pipe)(components, device="meta", torch_dtype=pipe.dtype)
    twin.__signature__ = pipe.__signature__
    return twin


@torch.no_grad()
def _rehearse(
    pipe: Pipeline,
    arguments: Mapping[str, Any],
    modules: Mapping[str, nn.Module],
    blocks: Mapping[str, Mapping[str, nn.Module]],
    device_type: str,
) -> list[StageLoad]:
    """The stages of a call, in running order."""
    quiet = {"progress_bar_cmd": iter} if arguments.get("progress_bar_cmd", progress_bar) is progress_bar else {}
    decodes = arguments.get("output_type") != "latents"
    # Pictures are made of pixels, and there are none.
    request = pipe.check(**{**arguments, **quiet, "output_type": "tensor" if decodes else "latents"})
    loads: list[StageLoad] = []
    with Rehearsal(device_type, modules, blocks) as rehearsal:

        @contextmanager
        def stage(name: str, roles: Sequence[str], *, steps: int = 1, rehearsed: int = 1) -> Iterator[None]:
            used = tuple(role for role in roles if role in modules)
            with rehearsal.stage(name) as seen:
                yield
            load = StageLoad(name, used, seen.device_bytes, seen.host_bytes, _runs(seen, used, rehearsed), steps)
            if loads and loads[-1].name == name:  # the same unit, for another branch
                loads[-1] = _joined(loads[-1], load)
            elif (used and seen.flops) or max(load.activations, load.host) >= _WORTH_A_STAGE:
                loads.append(load)

        _run(pipe, request, stage, decodes=decodes)
    return loads


def _run(pipe: Pipeline, request: Request, stage: Any, *, decodes: bool) -> None:
    """What `Pipeline.__call__` does, stage by stage, with as many steps as differ."""

    def around(step: Unit) -> Any:
        return stage(step.name, step.roles)

    state = pipe._new_state(request)
    run_units(pipe.program, pipe.components, state, around=around)
    sigmas = state.shared["sigmas"]
    groups = _by_roles(pipe, sigmas, state.view("cond"))
    latents = state.shared["latents"]
    for roles, levels in groups:
        rehearsed = min(len(levels), _REHEARSED_STEPS)
        state.shared["sigmas"] = torch.tensor([pair[0] for pair in levels[:rehearsed]] + [levels[rehearsed - 1][1]])
        name = "denoise" if len(groups) == 1 else f"denoise ({', '.join(roles)})"
        with stage(name, roles, steps=len(levels), rehearsed=rehearsed):
            latents = pipe._denoise(request, state)
    del state.shared["latents"]
    if decodes:
        used = dict.fromkeys(role for step in pipe.output_units for role in step.roles)
        with stage("decode", tuple(used)):
            pipe._output(request, state, latents)


def _by_roles(
    pipe: Pipeline, sigmas: Tensor, values: Mapping[str, Any]
) -> list[tuple[tuple[str, ...], list[tuple[float, float]]]]:
    """Steps, as pairs of noise levels, in runs that use the same roles."""
    pairs = list(pairwise(sigmas.tolist()))
    return [(roles, list(run)) for roles, run in groupby(pairs, lambda pair: pipe.roles_at(pair[0], values))]


def _runs(stage: Stage, roles: Sequence[str], rehearsed: int) -> tuple[Run, ...]:
    """Of one step: blocks, and then everything that is outside of them."""
    count = len(stage.visits) // rehearsed
    last = stage.visits[len(stage.visits) - count :]
    runs = [Run(visit.role, visit.block, visit.flops) for visit in last]
    rest = stage.flops // rehearsed - sum(run.flops for run in runs)
    return (*runs, Run(roles[0] if roles else "", "", max(rest, 0)))


def _joined(first: StageLoad, second: StageLoad) -> StageLoad:
    return replace(
        first,
        activations=max(first.activations, second.activations),
        host=max(first.host, second.host),
        runs=(*first.runs, *second.runs),
    )


def _with_tiles(whole: StageLoad, tiled: StageLoad) -> StageLoad:
    return replace(whole, tiled=tiled.activations) if tiled.activations < whole.activations else whole


def _blocks(module: nn.Module, wrapped: ManagedModule | None) -> dict[str, nn.Module]:
    """By name, cut as the component is, or as it would be."""
    if wrapped is not None:
        return {name: module.get_submodule(name) for name in wrapped.blocks}
    return {block.name: block.module for block in partition_by(architecture_of(module), module).blocks}


def _component(role: str, module: nn.Module, stored: torch.dtype | None) -> ComponentLoad:
    architecture = architecture_of(module)
    keeps = architecture.high_precision if architecture is not None else ()

    def packing(tensors: Mapping[str, Tensor]) -> Packing:
        return Packing(
            tensors, {name: (_kept(name, tensor, stored, keeps), tensor.dtype) for name, tensor in tensors.items()}
        )

    blocks = []
    parts = partition_by(architecture, module)
    for block in parts.blocks:
        packed = packing(block.parameters())
        blocks.append(BlockLoad(block.name, packed.stored_bytes, packed.computed_bytes))
    outside = packing(parts.rest)
    buffers = sum(buffer.numel() * buffer.element_size() for buffer in module.buffers())
    return ComponentLoad(role, tuple(blocks), outside.computed_bytes + buffers, outside.stored_bytes + buffers)


def _kept(name: str, tensor: Tensor, stored: torch.dtype | None, keeps: Sequence[str]) -> torch.dtype:
    if stored is None or not tensor.is_floating_point() or any(fnmatch.fnmatchcase(name, one) for one in keeps):
        return tensor.dtype
    return stored


def _speeds(device: torch.device, dtype: torch.dtype) -> Speeds:
    link, compute, disk = link_speed(device), compute_speed(device, dtype), disk_speed(_env.model_base_path())
    return Speeds(
        link.value,
        compute.value,
        disk.value,
        measured=link.measured and compute.measured,
        source="; ".join(dict.fromkeys((link.source, compute.source, disk.source))),
    )
