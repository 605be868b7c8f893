"""Memory plans of a pipeline's calls: the pipeline's own code runs on meta, and a planner divides what it measured.

`plan_call` plans a call of a pipeline in memory, `plan_model` one of a model whose weights need not be here. The
planner itself is `diffsynth.core.planning`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from diffsynth import _env
from diffsynth._models import ModelRecord
from diffsynth.core import device as devices
from diffsynth.core.device.memory import memory_in_use
from diffsynth.core.device.speed import compute_speed, disk_speed, link_speed
from diffsynth.core.loader.config import ModelConfig
from diffsynth.core.planning import BlockCall, MemoryPlan, Speeds, StageCost, StageTrace, Workload, plan_memory
from diffsynth.core.planning.tracer import MetaTracer
from diffsynth.core.planning.workload import StageKind
from diffsynth.core.progress import reporting
from diffsynth.core.vram.managed import ManagedModule, managed
from diffsynth.errors import NotEnoughMemory, Unplannable, shown
from diffsynth.runtime.architectures import architecture_of, partition_by
from diffsynth.runtime.composition import compose
from diffsynth.runtime.interface import PlannablePipeline
from diffsynth.runtime.meta_components import FixedLengthTokenizer, declared_components, without_weights
from diffsynth.runtime.progress import no_progress, progress_bar
from diffsynth.runtime.role import Processor, Tokenizer, check_component_names, grouped, member_roles
from diffsynth.runtime.unit import can_run
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
    pipe: PlannablePipeline, arguments: Mapping[str, Any], *, device: torch.device | str, **limits: Any
) -> MemoryPlan:
    """Return the `MemoryPlan` of one call of a built pipeline, whose weights may be on any device or on meta.

    Arguments and errors are those of `plan_with_output`.
    """
    return plan_with_output(pipe, arguments, device=device, **limits)[0]


def plan_with_output(
    pipe: PlannablePipeline,
    arguments: Mapping[str, Any],
    *,
    device: torch.device | str,
    vram_limit: float | None = None,
    ram_limit: float | None = None,
    policy: str | None = None,
    storages: Mapping[str, WeightStorage] | None = None,
    prompt_tokens: int = PROMPT_TOKENS,
) -> tuple[MemoryPlan, Any]:
    """Return (the `MemoryPlan` of one call, what the call returns, on meta): its latents if it asks for them, else its
    output as a tensor, if the pipeline can return one.

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
    try:
        device = torch.device(device)
    except (RuntimeError, TypeError):
        raise ValueError(f"device={shown(device)}: expected a name such as 'cuda'") from None
    check_policy(policy, vram_limit, device)
    base = _base_memory(pipe)
    meta_pipe = _on_meta(pipe, arguments, prompt_tokens)
    modules = {role: part for role, part in meta_pipe.parts.items() if isinstance(part, nn.Module)}
    wrapped = {role: managed(pipe.parts[role]) for role in modules}
    blocks = {role: _blocks(module, wrapped[role]) for role, module in modules.items()}
    stages, output = _trace(meta_pipe, arguments, modules, blocks, device.type)
    switches = _free_switches(meta_pipe, arguments) if vram_limit is not None else {}
    if switches:
        switched, _ = _trace(meta_pipe, {**arguments, **switches}, modules, blocks, device.type, loops=False)
        stages = [_with_switched(stage, switched) for stage in stages]
    if storages is None:
        storages = _storages(policy, wrapped, meta_pipe.dtype)

    def workload(storages: Mapping[str, WeightStorage]) -> Workload:
        components = tuple(component_footprint(role, module, storages[role]) for role, module in modules.items())
        facts = {"storage": storage_name(storages), "base_host_bytes": base, "on_host": device.type == "cpu"}
        return Workload(components, tuple(stages), switches=switches, **facts)

    limits: dict[str, Any] = {
        "vram_limit": vram_limit,
        "ram_limit": ram_limit,
        "speeds": _speeds(device, meta_pipe.dtype),
        "offloads": policy not in (None, "none"),
        "disk": tuple(role for role, each in storages.items() if each.on_disk),
    }
    choices = storage_choices(storages, device)
    try:
        return plan_memory(*map(workload, choices), **limits), output
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
    components: Mapping[str, ModelConfig] | None = None,
    **limits: Any,
) -> MemoryPlan:
    """Return the `MemoryPlan` of one call of a model, from its files' headers or published layouts, without weights.

    Args:
        record: of the model.
        arguments: of the call.
        device: None is the first accelerator; in a machine without one, the preferred kind of accelerator.
        dtype: name of a torch dtype, of weights and activations.
        components: role -> file, as in `diffsynth.load`.
        limits: the further arguments of `plan_with_output`, which also lists the errors.

    Raises:
        TypeError: a `dtype` that names no floating-point dtype of 16 bits or more.
    """
    if device is None:
        device = devices.default_device()
        device = devices.ACCELERATORS[0] if device.type == "cpu" else device
    chosen = devices.check_floating(getattr(torch, dtype, dtype), "dtype")
    return plan_call(unloaded(record, chosen, components), arguments, device=device, **limits)


def check_before_loading(
    record: ModelRecord,
    arguments: Mapping[str, Any],
    *,
    components: Mapping[str, ModelConfig] | None = None,
    prepare: Callable[[Any], None] | None = None,
) -> int | None:
    """Check the arguments of a call of a model before weights are read, and return the number of its results; raise
    the error that the call would raise. None if the call cannot be checked.

    Not checked are what depends on the device, and models whose files are neither here nor declared by a plugin.

    Args:
        record: of the model.
        arguments: of the call.
        components: role -> file, as in `diffsynth.load`.
        prepare: function that is called with the pipeline without weights before the call is checked, such as to add
            LoRAs.

    Raises:
        TypeError: `components` names a role that the pipeline does not have.
        Exception: the error that the call would raise for them, or that of `prepare`.
    """
    try:
        pipe = unloaded(record, torch.bfloat16, components)
    except Unplannable:
        return None
    for role, need in pipe.roles.items():
        if isinstance(need, Processor) and not need.optional:
            pipe.components[role] = FixedLengthTokenizer(PROMPT_TOKENS)
    if prepare is not None:
        prepare(pipe)
    return pipe.check(**{name: value for name, value in arguments.items() if name != "attention"}).batch_size


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


def unloaded(
    record: ModelRecord, dtype: torch.dtype = torch.bfloat16, given: Mapping[str, ModelConfig] | None = None
) -> PlannablePipeline:
    """Return the `Pipeline` of a model with its components on meta (no weights) and without its processors.

    Args:
        record: of the model.
        dtype: of its weights.
        given: role -> file, as in `diffsynth.load`.

    Raises:
        Unplannable: a file is neither here nor declared.
        TypeError: `given` names a role that the pipeline does not have.
    """
    cls = resolve(record.pipeline)
    roles = compose(cls).roles
    check_component_names(given or {}, roles, pipeline_name=cls.__name__)
    components = dict.fromkeys(roles) | grouped(declared_components(record, dtype, given=given or {}, roles=roles))
    return cls(components, device="meta", torch_dtype=dtype).named(record.name, record.defaults)


def _base_memory(pipe: PlannablePipeline) -> int:
    """Return the host memory that this process uses beside the pipeline's weights, in bytes; 0 where it is unknown."""
    tensors = {
        tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes()
        for part in pipe.parts.values()
        if isinstance(part, nn.Module)
        for tensor in (*part.parameters(), *part.buffers())
        if tensor.device.type == "cpu"
    }
    return max((memory_in_use("cpu") or 0) - sum(tensors.values()), 0)


def _on_meta(pipe: PlannablePipeline, arguments: Mapping[str, Any], prompt_tokens: int) -> PlannablePipeline:
    """Return a copy of a pipeline on meta, without weights; a tokenizer is faked if it or the text is missing."""
    texts = any(name in arguments for name in pipe.per_image)

    def on_meta(role: str, part: Any) -> Any:
        if isinstance(part, tuple):
            return tuple(on_meta(role, each) for each in part)
        if isinstance(part, nn.Module):
            return without_weights(part, pipe.dtype)
        if isinstance(pipe.roles[role], Tokenizer) and not (texts and part is not None):
            return FixedLengthTokenizer(prompt_tokens)
        return part

    components = {role: on_meta(role, part) for role, part in pipe.components.items()}
    meta_pipe = type(pipe)(components, device="meta", torch_dtype=pipe.dtype)  # type: ignore[call-arg]
    meta_pipe.__signature__ = pipe.__signature__
    return meta_pipe


def _free_switches(pipe: PlannablePipeline, arguments: Mapping[str, Any]) -> dict[str, Any]:
    """Return a dict argument -> value of the switches that a plan of this call may set: those whose argument is None,
    and that some unit which runs reads.
    """
    program, signature = pipe.program, pipe.__signature__
    return {
        name: value
        for name, value in program.switches.items()
        if name in signature.parameters
        and arguments.get(name, signature.parameters[name].default) is None
        and any(can_run(step, pipe.components) for step in program.owners(name))
    }


@torch.no_grad()
def _trace(
    pipe: PlannablePipeline,
    arguments: Mapping[str, Any],
    modules: Mapping[str, nn.Module],
    blocks: Mapping[str, Mapping[str, nn.Module]],
    device_type: str,
    *,
    loops: bool = True,
) -> tuple[list[StageCost], Any]:
    """Return (a list of the `StageCost`s of a call, its result on meta): the costs in running order, without cheap
    stages (no network, under 16 MiB) and, unless `loops`, those of the loop.

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
    values = pipe.call_values(request)
    with MetaTracer(device_type, modules, blocks) as tracer, reporting():
        for stage in pipe.stages(request):
            if stage.kind is StageKind.DENOISE and not loops:
                values.shared["latents"] = values.shared["latents"].float()  # as the loop leaves them
                continue
            for part in stage.parts(values, at_most=_TRACED_STEPS):
                used = tuple(role for role in member_roles(part.roles, pipe.components) if role in modules)
                with tracer.stage(part.name) as trace:
                    part.run()
                calls = _block_calls(trace, used, part.traced)
                cost = StageCost(stage.kind, part.name, used, trace.device_bytes, trace.host_bytes, calls, part.steps)
                if (used and trace.flops) or max(cost.activations, cost.host_bytes) >= _STAGE_BYTES:
                    costs.append(cost)
    return costs, values.shared.get("output" if decodes else "latents")


def _block_calls(trace: StageTrace, roles: Sequence[str], traced: int) -> tuple[BlockCall, ...]:
    """Return a tuple of the last traced step's `BlockCall`s, then one, named "", for operations outside of blocks."""
    count = len(trace.block_calls) // traced
    calls = trace.block_calls[len(trace.block_calls) - count :]
    rest = trace.flops // traced - sum(call.flops for call in calls)
    return (*calls, BlockCall(roles[0] if roles else "", "", max(rest, 0)))


def _with_switched(stage: StageCost, switched: Sequence[StageCost]) -> StageCost:
    """Return `stage`, with the costs of the same stage in `switched` as its switched costs if they differ."""
    same = next((each for each in switched if each.name == stage.name), None)
    if same is None or (same.activations, same.block_calls) == (stage.activations, stage.block_calls):
        return stage
    return replace(stage, switched_activations=same.activations, switched_block_calls=same.block_calls)


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
