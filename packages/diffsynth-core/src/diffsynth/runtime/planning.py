"""Memory plans of a pipeline's calls: the pipeline's own code runs on meta, and a planner divides what it measured.

`plan_call` plans a call of a pipeline in memory, `plan_model` one of a model whose weights need not be here. The
planner itself is `diffsynth.core.planning`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from itertools import groupby, pairwise
from typing import Any

import torch
from torch import Tensor, nn

from diffsynth import _env
from diffsynth._models import ModelRecord
from diffsynth.core import device as devices
from diffsynth.core.device.memory import memory_in_use
from diffsynth.core.device.speed import compute_speed, disk_speed, link_speed
from diffsynth.core.planning import BlockCall, MemoryPlan, Speeds, StageCost, StageTrace, Workload, plan_memory
from diffsynth.core.planning.tracer import MetaTracer
from diffsynth.core.vram.managed import ManagedModule, managed
from diffsynth.errors import NotEnoughMemory, Unplannable
from diffsynth.runtime.architectures import architecture_of, partition_by
from diffsynth.runtime.interface import PlannablePipeline
from diffsynth.runtime.meta_components import FixedLengthTokenizer, declared_components, without_weights
from diffsynth.runtime.progress import no_progress, progress_bar
from diffsynth.runtime.request import Request
from diffsynth.runtime.role import Processor
from diffsynth.runtime.unit import Unit, can_run, run_units
from diffsynth.runtime.weight_storage import (
    WeightStorage,
    check_policy,
    component_footprint,
    storage_choices,
    storage_name,
    storages_under,
)
from diffsynth.spec import resolve

PROMPT_TOKENS = 512
"""The length of a prompt that is not known: more than most prompts have."""

_TRACED_STEPS = 2
"""Steps that are run: the first one allocates what the second finds, and all later steps are like the second."""

_STAGE_BYTES = 16 * 2**20
"""Bytes from which a unit without a network is a stage of its own."""


def plan_call(
    pipe: PlannablePipeline,
    arguments: Mapping[str, Any],
    *,
    device: torch.device | str,
    vram_limit: float | None = None,
    ram_limit: float | None = None,
    policy: str | None = None,
    storages: Mapping[str, WeightStorage] | None = None,
    prompt_tokens: int = PROMPT_TOKENS,
) -> MemoryPlan:
    """Return the `MemoryPlan` of one call of a built pipeline, whose weights may be on any device or on meta.

    Args:
        pipe: with its components, on any device, meta included; nothing of it changes.
        arguments: of the call. Without a prompt a text of `prompt_tokens` tokens is assumed.
        device: that the call is meant for. It need not be in this machine: its speed is assumed then.
        vram_limit, ram_limit: GiB; see `plan_memory`.
        policy: a preset's name, or "auto". None is the policies of the components; for those without one, "dynamic"
            with a limit and "none" without.
        storages: role -> storage of its weights, in place of `policy`.
        prompt_tokens: the length of the assumed prompt, at least 1.

    Raises:
        TypeError, ValueError: an argument that the call would refuse, too.
        NotEnoughMemory: a limit cannot be kept; the message has the smallest that can.
        Unplannable: the pipeline's code asks for values that only a real run has.
    """
    device = torch.device(device)
    check_policy(policy, vram_limit, device)
    base = _base_memory(pipe)
    meta_pipe = _on_meta(pipe, arguments, prompt_tokens)
    modules = {role: part for role, part in meta_pipe.components.items() if isinstance(part, nn.Module)}
    wrapped = {role: managed(pipe.components[role]) for role in modules}
    blocks = {role: _blocks(module, wrapped[role]) for role, module in modules.items()}
    stages = _trace(meta_pipe, arguments, modules, blocks, device.type)
    tiles = _tiles_argument(meta_pipe, arguments)
    if tiles is None and vram_limit is not None:
        tiled = _trace(meta_pipe, {**arguments, "tiled": True}, modules, blocks, device.type, loops=False)
        stages = [_with_tiles(stage, tiled) for stage in stages]
    if storages is None:
        storages = _storages(policy, wrapped, meta_pipe.dtype)

    def workload(storages: Mapping[str, WeightStorage]) -> Workload:
        components = tuple(component_footprint(role, module, storages[role]) for role, module in modules.items())
        facts = {"storage": storage_name(storages), "base_host_bytes": base, "on_host": device.type == "cpu"}
        return Workload(components, tuple(stages), asks_for_tiles=bool(tiles), **facts)

    limits: dict[str, Any] = {
        "vram_limit": vram_limit,
        "ram_limit": ram_limit,
        "speeds": _speeds(device, meta_pipe.dtype),
        "offloads": policy not in (None, "none"),
        "disk": tuple(role for role, each in storages.items() if each.on_disk),
    }
    choices = storage_choices(storages, device)
    try:
        return plan_memory(*map(workload, choices), **limits)
    except NotEnoughMemory as error:
        # Another policy may still keep the limit; the message names the first that does.
        for name in ("dynamic", "fp8"):
            others = [each for each in storage_choices(storages_under(name, modules), device) if each not in choices]
            if others and _fits(workload(others[0]), limits):
                raise NotEnoughMemory(f"{error}. policy={name!r} can keep this limit") from None
        raise


def plan_model(
    record: ModelRecord,
    arguments: Mapping[str, Any],
    *,
    device: torch.device | str | None = None,
    dtype: str = "bfloat16",
    **limits: Any,
) -> MemoryPlan:
    """Return the `MemoryPlan` of one call of a model, from its files' headers or published layouts, without weights.

    Args:
        record: of the model.
        arguments: of the call.
        device: None is the first accelerator; in a machine without one, the preferred kind of accelerator.
        dtype: name of a torch dtype, of weights and activations.
        limits: the further arguments of `plan_call`, which also lists the errors.
    """
    if device is None:
        device = devices.default_device()
        device = devices.ACCELERATORS[0] if device.type == "cpu" else device
    return plan_call(_unloaded(record, getattr(torch, dtype)), arguments, device=device, **limits)


def check_before_loading(record: ModelRecord, arguments: Mapping[str, Any]) -> None:
    """Check the arguments of a call of a model before weights are read; raise the error that the call would raise.

    Not checked are what depends on the device, and models whose files are neither here nor declared by a plugin.

    Args:
        record: of the model.
        arguments: of the call.

    Raises:
        Exception: the error that the call would raise for them.
    """
    try:
        pipe = _unloaded(record, torch.bfloat16)
    except Unplannable:
        return
    for role, need in pipe.roles.items():
        if isinstance(need, Processor) and not need.optional:
            pipe.components[role] = FixedLengthTokenizer(PROMPT_TOKENS)
    pipe.check(**{name: value for name, value in arguments.items() if name != "attention"})


def _fits(workload: Workload, limits: Mapping[str, Any]) -> bool:
    try:
        plan_memory(workload, **limits)
    except NotEnoughMemory:
        return False
    return True


def _storages(
    policy: str | None, wrapped: Mapping[str, ManagedModule | None], dtype: torch.dtype
) -> dict[str, WeightStorage]:
    if policy is not None:
        return storages_under(policy, wrapped)
    return {
        role: WeightStorage() if module is None else WeightStorage.under(module.policy, dtype, module)
        for role, module in wrapped.items()
    }


def _unloaded(record: ModelRecord, dtype: torch.dtype) -> PlannablePipeline:
    """Return the `Pipeline` of a model with its components on meta (no weights) and without its processors.

    Raises:
        Unplannable: a file is neither here nor declared.
    """
    cls = resolve(record.pipeline)
    components = dict.fromkeys(cls.roles) | declared_components(record, dtype)
    return cls(components, device="meta", torch_dtype=dtype).named(record.name, record.defaults)


def _base_memory(pipe: PlannablePipeline) -> int:
    """Return the host memory that this process uses beside the pipeline's weights, in bytes; 0 where it is unknown."""
    tensors = {
        tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes()
        for part in pipe.components.values()
        if isinstance(part, nn.Module)
        for tensor in (*part.parameters(), *part.buffers())
        if tensor.device.type == "cpu"
    }
    return max((memory_in_use("cpu") or 0) - sum(tensors.values()), 0)


def _on_meta(pipe: PlannablePipeline, arguments: Mapping[str, Any], prompt_tokens: int) -> PlannablePipeline:
    """Return a copy of a pipeline on meta, without weights; a tokenizer is faked if it or the prompt is missing."""
    components: dict[str, Any] = {}
    for role, part in pipe.components.items():
        if isinstance(part, nn.Module):
            components[role] = without_weights(part, pipe.dtype)
        elif "tokenizer" in role and ("prompt" not in arguments or part is None):
            components[role] = FixedLengthTokenizer(prompt_tokens)
        else:
            components[role] = part
    meta_pipe = type(pipe)(components, device="meta", torch_dtype=pipe.dtype)  # type: ignore[call-arg]
    meta_pipe.__signature__ = pipe.__signature__
    return meta_pipe


def _tiles_argument(pipe: PlannablePipeline, arguments: Mapping[str, Any]) -> bool | None:
    """Return the argument `tiled` of a call as a bool, False for a pipeline without tiles; None leaves it to the plan.

    None, if neither the call passes a value nor the pipeline's default is True.

    A pipeline without the argument `tiled`, or without the component that it is for, works without tiles.
    """
    parameter = pipe.__signature__.parameters.get("tiled")
    if parameter is None or not any(can_run(step, pipe.components) for step in pipe.program.owners("tiled")):
        return False
    tiled = arguments.get("tiled", parameter.default or None)
    return None if tiled is None else bool(tiled)


@torch.no_grad()
def _trace(
    pipe: PlannablePipeline,
    arguments: Mapping[str, Any],
    modules: Mapping[str, nn.Module],
    blocks: Mapping[str, Mapping[str, nn.Module]],
    device_type: str,
    *,
    loops: bool = True,
) -> list[StageCost]:
    """Return a list of the `StageCost`s of a call, in running order, without cheap stages (no network, under 16 MiB)
    and, unless `loops`, those of the loop.

    Args:
        pipe: on meta.
        arguments: of the call.
        modules: role -> component on meta.
        blocks: role -> block name -> block.
        device_type: of the device that the call is meant for; kernels and their workspaces depend on it.
        loops: whether the loop is run.
    """
    quiet = {"progress_bar_cmd": no_progress} if arguments.get("progress_bar_cmd", progress_bar) is progress_bar else {}
    decodes = arguments.get("output_type") != "latents"
    # PIL images are made of pixel values, which tensors on meta do not have.
    request = pipe.check(**{**arguments, **quiet, "output_type": "tensor" if decodes else "latents"})
    costs: list[StageCost] = []
    with MetaTracer(device_type, modules, blocks) as tracer:

        @contextmanager
        def stage(name: str, roles: Sequence[str], *, steps: int = 1, traced: int = 1) -> Iterator[None]:
            used = tuple(role for role in roles if role in modules)
            with tracer.stage(name) as trace:
                yield
            cost = StageCost(name, used, trace.device_bytes, trace.host_bytes, _block_calls(trace, used, traced), steps)
            if costs and costs[-1].name == name:  # the same unit, for another branch
                costs[-1] = _joined(costs[-1], cost)
            elif (used and trace.flops) or max(cost.activations, cost.host_bytes) >= _STAGE_BYTES:
                costs.append(cost)

        _run_stages(pipe, request, stage, decodes=decodes, loops=loops)
    return costs


def _run_stages(pipe: PlannablePipeline, request: Request, stage: Any, *, decodes: bool, loops: bool) -> None:
    """Run the code of `Pipeline.__call__` stage by stage, with at most two steps of the loop for each run of steps that
    use equal roles.

    Args:
        pipe: on meta.
        request: the checked call.
        stage: called with a stage's name and roles; returns the context manager that the stage runs in.
        decodes: whether the output units run.
        loops: whether the loop runs.
    """

    def around(step: Unit) -> Any:
        return stage(step.name, step.roles)

    values = pipe.call_values(request)
    run_units(pipe.program, pipe.components, values, around=around)
    sigmas = values.shared["sigmas"]
    groups = _steps_by_roles(pipe, sigmas, values.for_branch("cond")) if loops else []
    latents = values.shared["latents"].float()  # as the loop returns them
    for roles, levels in groups:
        traced = min(len(levels), _TRACED_STEPS)
        values.shared["sigmas"] = torch.tensor([pair[0] for pair in levels[:traced]] + [levels[traced - 1][1]])
        name = "denoise" if len(groups) == 1 else f"denoise ({', '.join(roles)})"
        with stage(name, roles, steps=len(levels), traced=traced):
            latents = pipe.denoise(request, values)
    del values.shared["latents"]
    if decodes:
        used = dict.fromkeys(role for step in pipe.output_units for role in step.roles)
        with stage("decode", tuple(used)):
            pipe.decode(request, values, latents)


def _steps_by_roles(
    pipe: PlannablePipeline, sigmas: Tensor, values: Mapping[str, Any]
) -> list[tuple[tuple[str, ...], list[tuple[float, float]]]]:
    """Return a list of (roles, list of (noise level, next noise level)), one per run of steps that use equal roles."""
    pairs = list(pairwise(sigmas.tolist()))
    return [(roles, list(run)) for roles, run in groupby(pairs, lambda pair: pipe.roles_at(pair[0], values))]


def _block_calls(trace: StageTrace, roles: Sequence[str], traced: int) -> tuple[BlockCall, ...]:
    """Return a tuple of the last traced step's `BlockCall`s, then one, named "", for operations outside of blocks."""
    count = len(trace.block_calls) // traced
    calls = trace.block_calls[len(trace.block_calls) - count :]
    rest = trace.flops // traced - sum(call.flops for call in calls)
    return (*calls, BlockCall(roles[0] if roles else "", "", max(rest, 0)))


def _joined(first: StageCost, second: StageCost) -> StageCost:
    return replace(
        first,
        activations=max(first.activations, second.activations),
        host_bytes=max(first.host_bytes, second.host_bytes),
        block_calls=(*first.block_calls, *second.block_calls),
    )


def _with_tiles(whole: StageCost, tiled: Sequence[StageCost]) -> StageCost:
    """Return `whole`, with the memory and calls of the same stage in `tiled` as its tiled costs if they differ."""
    same = next((stage for stage in tiled if stage.name == whole.name), None)
    if same is None or (same.activations, same.block_calls) == (whole.activations, whole.block_calls):
        return whole
    return replace(whole, tiled_activations=same.activations, tiled_block_calls=same.block_calls)


def _blocks(module: nn.Module, wrapped: ManagedModule | None) -> dict[str, nn.Module]:
    """Return a dict name -> module of a component's blocks: those it is wrapped in, else those `wrap` would cut."""
    if wrapped is not None:
        return {name: module.get_submodule(name) for name in wrapped.blocks}
    return {block.name: block.module for block in partition_by(architecture_of(module), module).blocks}


def _speeds(device: torch.device, dtype: torch.dtype) -> Speeds:
    link, compute, disk = link_speed(device), compute_speed(device, dtype), disk_speed(_env.model_base_path())
    return Speeds(
        link.value,
        compute.value,
        disk.value,
        measured=link.measured and compute.measured,
        source="; ".join(dict.fromkeys((link.source, compute.source, disk.source))),
    )
