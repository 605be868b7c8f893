"""What a call would take: the pipeline's own code, run on meta, and a budget over what was seen."""

from __future__ import annotations

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
from diffsynth.core.planning import BlockCall, MemoryPlan, Speeds, StageCost, Workload, plan_memory
from diffsynth.core.planning.tracer import MetaTracer, StageTrace
from diffsynth.core.vram.managed import ManagedModule, managed
from diffsynth.errors import NotEnoughMemory, Unplannable
from diffsynth.runtime.memory_options import architecture_of, partition_by
from diffsynth.runtime.meta_components import FixedLengthTokenizer, declared_components, without_weights
from diffsynth.runtime.progress import progress_bar
from diffsynth.runtime.request import Request
from diffsynth.runtime.role import Processor
from diffsynth.runtime.unit import Unit, run_units
from diffsynth.runtime.weight_storage import (
    WeightStorage,
    check_policy,
    component_footprint,
    offered,
    storage_name,
    storages_under,
)
from diffsynth.spec import resolve

if TYPE_CHECKING:
    from diffsynth._models import ModelRecord
    from diffsynth.runtime.pipeline import Pipeline

PROMPT_TOKENS = 512
"""Of a prompt that is not given: more than most have."""

_TRACED_STEPS = 2
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
    storages: Mapping[str, WeightStorage] | None = None,
    prompt_tokens: int = PROMPT_TOKENS,
) -> MemoryPlan:
    """The plan of one call of a pipeline.

    Args:
        pipe: with its components, on any device, meta included; they are only looked at.
        arguments: of the call. Without a prompt a text of `prompt_tokens` tokens is assumed.
        device: that the call is meant for. It need not be here: then its speed is assumed.
        vram_limit, ram_limit: GiB; see `plan_memory`.
        policy: a preset's name, or "auto"; None is how components are held, and for those that are not "dynamic" with
            a limit and "none" without.
        waiting: how the weights of each component wait, in place of `policy`.
        prompt_tokens: see above.

    Raises:
        TypeError, ValueError: an argument that the call would refuse, too.
        NotEnoughMemory: a limit cannot be kept; the message has the smallest that can.
        Unplannable: the pipeline's code asks for values that only a real run has.
    """
    device = torch.device(device)
    check_policy(policy, vram_limit, device)
    base = _base(pipe)
    twin = _on_meta(pipe, arguments, prompt_tokens)
    modules = {role: part for role, part in twin.components.items() if isinstance(part, nn.Module)}
    wrapped = {role: managed(pipe.components[role]) for role in modules}
    blocks = {role: _blocks(module, wrapped[role]) for role, module in modules.items()}
    stages = _trace(twin, arguments, modules, blocks, device.type)
    asked = _tiles_asked_for(twin, arguments)
    if asked is None and vram_limit is not None:
        tiled = _trace(twin, {**arguments, "tiled": True}, modules, blocks, device.type, loops=False)
        stages = [_with_tiles(stage, tiled) for stage in stages]
    if storages is None:
        storages = _storages(policy, wrapped, twin.dtype)

    def workload(storages: Mapping[str, WeightStorage]) -> Workload:
        components = tuple(component_footprint(role, module, storages[role]) for role, module in modules.items())
        facts = {"storage": storage_name(storages), "base": base, "on_host": device.type == "cpu"}
        return Workload(components, tuple(stages), asks_for_tiles=bool(asked), **facts)

    limits: dict[str, Any] = {
        "vram_limit": vram_limit,
        "ram_limit": ram_limit,
        "speeds": _speeds(device, twin.dtype),
        "offloads": policy not in (None, "none"),
        "disk": tuple(role for role, each in storages.items() if each.on_disk),
    }
    choices = offered(storages, device)
    try:
        return plan_memory(*map(workload, choices), **limits)
    except NotEnoughMemory as error:
        for name in ("dynamic", "fp8"):
            others = [each for each in offered(storages_under(name, modules), device) if each not in choices]
            if others and _fits(workload(others[0]), limits):
                raise NotEnoughMemory(f"{error}. policy={name!r} can keep this limit") from None
        raise


def _storages(
    policy: str | None, wrapped: Mapping[str, ManagedModule | None], dtype: torch.dtype
) -> dict[str, WeightStorage]:
    if policy is not None:
        return storages_under(policy, wrapped)
    return {
        role: WeightStorage() if held is None else WeightStorage.under(held.policy, dtype, held)
        for role, held in wrapped.items()
    }


def _fits(workload: Workload, limits: Mapping[str, Any]) -> bool:
    try:
        plan_memory(workload, **limits)
    except NotEnoughMemory:
        return False
    return True


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
    return plan_call(_unloaded(record, getattr(torch, dtype)), arguments, device=device, **limits)


def check_before_loading(record: ModelRecord, arguments: Mapping[str, Any]) -> None:
    """Refuse what a call would refuse before its first stage, while no weights are read yet.

    A model whose files are neither here nor declared, and what depends on the device, is left to the call.

    Args:
        record: of the model.
        arguments: of the call.

    Raises:
        Exception: what the call would raise for them.
    """
    try:
        pipe = _unloaded(record, torch.bfloat16)
    except Unplannable:
        return
    for role, need in pipe.roles.items():
        if isinstance(need, Processor) and not need.optional:
            pipe.components[role] = FixedLengthTokenizer(PROMPT_TOKENS)
    pipe.check(**{name: value for name, value in arguments.items() if name != "attention"})


def _unloaded(record: ModelRecord, dtype: torch.dtype) -> Pipeline:
    """The pipeline of a model, on meta and without its processors.

    Raises:
        Unplannable: a file is neither here nor declared.
    """
    cls: type[Pipeline] = resolve(record.pipeline)
    components = dict.fromkeys(cls.roles) | declared_components(record, dtype)
    return cls(components, device="meta", torch_dtype=dtype).named(record.name, record.defaults)


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
            components[role] = FixedLengthTokenizer(prompt_tokens)
        else:
            components[role] = part
    twin = type(pipe)(components, device="meta", torch_dtype=pipe.dtype)
    twin.__signature__ = pipe.__signature__
    return twin


def _tiles_asked_for(pipe: Pipeline, arguments: Mapping[str, Any]) -> bool | None:
    """What the call says of tiles; None leaves it to the plan, as a pipeline does whose own default is not True."""
    parameter = pipe.__signature__.parameters.get("tiled")
    if parameter is None:
        return False
    given = arguments.get("tiled", parameter.default or None)
    return None if given is None else bool(given)


@torch.no_grad()
def _trace(
    pipe: Pipeline,
    arguments: Mapping[str, Any],
    modules: Mapping[str, nn.Module],
    blocks: Mapping[str, Mapping[str, nn.Module]],
    device_type: str,
    *,
    loops: bool = True,
) -> list[StageCost]:
    """The stages of a call, in running order; without `loops`, those of the loop are left out."""
    quiet = {"progress_bar_cmd": iter} if arguments.get("progress_bar_cmd", progress_bar) is progress_bar else {}
    decodes = arguments.get("output_type") != "latents"
    # Pictures are made of pixels, and there are none.
    request = pipe.check(**{**arguments, **quiet, "output_type": "tensor" if decodes else "latents"})
    loads: list[StageCost] = []
    with MetaTracer(device_type, modules, blocks) as tracer:

        @contextmanager
        def stage(name: str, roles: Sequence[str], *, steps: int = 1, traced: int = 1) -> Iterator[None]:
            used = tuple(role for role in roles if role in modules)
            with tracer.stage(name) as seen:
                yield
            load = StageCost(name, used, seen.device_bytes, seen.host_bytes, _runs(seen, used, traced), steps)
            if loads and loads[-1].name == name:  # the same unit, for another branch
                loads[-1] = _joined(loads[-1], load)
            elif (used and seen.flops) or max(load.activations, load.host) >= _WORTH_A_STAGE:
                loads.append(load)

        _run(pipe, request, stage, decodes=decodes, loops=loops)
    return loads


def _run(pipe: Pipeline, request: Request, stage: Any, *, decodes: bool, loops: bool) -> None:
    """What `Pipeline.__call__` does, stage by stage, with as many steps as differ."""

    def around(step: Unit) -> Any:
        return stage(step.name, step.roles)

    state = pipe._new_state(request)
    run_units(pipe.program, pipe.components, state, around=around)
    sigmas = state.shared["sigmas"]
    groups = _by_roles(pipe, sigmas, state.view("cond")) if loops else []
    latents = state.shared["latents"].float()  # as the loop leaves them
    for roles, levels in groups:
        traced = min(len(levels), _TRACED_STEPS)
        state.shared["sigmas"] = torch.tensor([pair[0] for pair in levels[:traced]] + [levels[traced - 1][1]])
        name = "denoise" if len(groups) == 1 else f"denoise ({', '.join(roles)})"
        with stage(name, roles, steps=len(levels), traced=traced):
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


def _runs(stage: StageTrace, roles: Sequence[str], traced: int) -> tuple[BlockCall, ...]:
    """Of one step: blocks, and then everything that is outside of them."""
    count = len(stage.blocks_run) // traced
    last = stage.blocks_run[len(stage.blocks_run) - count :]
    runs = [BlockCall(block_run.role, block_run.block, block_run.flops) for block_run in last]
    rest = stage.flops // traced - sum(run.flops for run in runs)
    return (*runs, BlockCall(roles[0] if roles else "", "", max(rest, 0)))


def _joined(first: StageCost, second: StageCost) -> StageCost:
    return replace(
        first,
        activations=max(first.activations, second.activations),
        host=max(first.host, second.host),
        runs=(*first.runs, *second.runs),
    )


def _with_tiles(whole: StageCost, tiled: Sequence[StageCost]) -> StageCost:
    same = next((stage for stage in tiled if stage.name == whole.name), None)
    if same is None or (same.activations, same.runs) == (whole.activations, whole.runs):
        return whole
    return replace(whole, tiled=same.activations, tiled_runs=same.runs)


def _blocks(module: nn.Module, wrapped: ManagedModule | None) -> dict[str, nn.Module]:
    """By name, cut as the component is, or as it would be."""
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
