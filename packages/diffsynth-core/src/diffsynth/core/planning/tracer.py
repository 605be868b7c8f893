"""The meta trace: a run of the real code on torch's meta device that counts its memory and its operations."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only

from diffsynth.core.attention.meta import MetaCall, meta_call_of_sdpa, observed_meta_calls
from diffsynth.core.planning.allocations import AllocationTracker, kernel_workspace
from diffsynth.core.planning.meta_results import KnownValues, MetaResultCache, tensors_in
from diffsynth.core.planning.repeated_calls import RepeatedCalls
from diffsynth.core.planning.workload import BlockCall, StageTrace
from diffsynth.core.repeats import intercepted_by
from diffsynth.errors import Unplannable

_aten = torch.ops.aten
_FACTORIES: tuple[Any, ...] = (torch.tensor, torch.as_tensor, torch.asarray)
_READERS: tuple[Any, ...] = (Tensor.tolist, Tensor.numpy)
_NEEDS_VALUES = (torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape)
_INDEXED = (_aten.index, _aten.index_put, _aten.index_put_)


@functools.cache
def _flop_counts() -> Mapping[Any, Callable[..., int]]:
    """Return torch's mapping of operations to functions that count their floating-point operations."""
    from torch.utils.flop_counter import flop_registry  # imports triton, which a call without a plan does not need

    return flop_registry


class MetaTracer:
    """Traces code that runs on the meta device inside `with tracer:`, stage by stage.

    Args:
        device_type: type of the device that is planned for, "cuda" or "cpu": kernels there take different workspaces.
        components: role -> module, all on meta. Their weights are not counted.
        blocks: role -> name -> block; their calls are recorded.
    """

    def __init__(
        self,
        device_type: str,
        components: Mapping[str, nn.Module],
        blocks: Mapping[str, Mapping[str, nn.Module]] | None = None,
    ) -> None:
        self.device_type = device_type
        self.stages: list[StageTrace] = []
        self.allocations = AllocationTracker()
        self.values = KnownValues()
        self._blocks = blocks or {}
        self._exit = ExitStack()
        for module in components.values():
            self.allocations.ignore((*module.parameters(), *module.buffers()))

    def __enter__(self) -> MetaTracer:
        with ExitStack() as entered:
            for role, blocks in self._blocks.items():
                for name, module in blocks.items():
                    self._record_calls(entered, role, name, module)
            entered.enter_context(observed_meta_calls(self.attention))
            entered.enter_context(intercepted_by(RepeatedCalls(self.stages, self.allocations, self.values)))
            entered.enter_context(_FunctionMode(self))
            entered.enter_context(_DispatchMode(self))
            self._exit = entered.pop_all()
        return self

    def __exit__(self, *error: object) -> None:
        self._exit.close()

    @contextmanager
    def stage(self, name: str) -> Iterator[StageTrace]:
        """Context manager that counts what runs inside as one stage and yields its `StageTrace`, whose peaks are filled
        in at the end.

        The trace is in `stages`, too.
        """
        stage = StageTrace(name)
        self.stages.append(stage)
        self.allocations.reset_peak()
        yield stage
        stage.device_bytes, stage.host_bytes = self.allocations.peak["device"], self.allocations.peak["host"]

    def count(self, flops: int) -> None:
        """Add `flops` floating-point operations to the current stage; do nothing if there is no stage."""
        if self.stages:
            self.stages[-1].flops += flops

    def attention(self, call: MetaCall) -> None:
        """Add a call of attention to the counts: the bytes of its output and of its scratch memory, and its
        floating-point operations.
        """
        self.allocations.allocated(call.out)
        self.allocations.workspace(call.workspace(self.device_type))
        self.count(call.flops)

    def _record_calls(self, entered: ExitStack, role: str, name: str, module: nn.Module) -> None:
        flops_before: list[int] = []

        def begins(*_: object) -> None:
            if self.stages:
                flops_before.append(self.stages[-1].flops)

        def ends(*_: object) -> None:
            if self.stages:
                flops = self.stages[-1].flops - flops_before.pop()
                self.stages[-1].block_calls.append(BlockCall(role, name, flops))

        entered.callback(module.register_forward_pre_hook(begins).remove)
        entered.callback(module.register_forward_hook(ends).remove)


class _DispatchMode(TorchDispatchMode):
    """Sees each operation of torch, below autograd."""

    def __init__(self, tracer: MetaTracer) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._tracer = tracer
        self._results = MetaResultCache()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        tracer, values = self._tracer, self._tracer.values
        inputs = tensors_in(args, kwargs)
        if _needs_values(func) and (known := _by_value(values, func, args, kwargs)):
            return known[0]
        if func is _aten._to_copy.default and inputs[0].is_meta and _goes_to_cpu(kwargs):
            return self._to_host(inputs[0], kwargs)
        if any(tensor.is_meta for tensor in inputs):
            if func is _aten.copy_.default and not args[0].is_meta:
                # torch would refuse to copy from meta: the host tensor keeps its memory, and its values are unknown.
                values.invalidate_written(func, args, kwargs)
                return args[0]
            if not all(tensor.is_meta for tensor in inputs):
                args, kwargs = tree_map_only(Tensor, _as_meta(values), (args, kwargs))
            if func.overloadpacket in _INDEXED:
                args = (args[0], _integer_indices(values, args[1]), *args[2:])
        out = self._results(func, args, kwargs)
        values.record(func, args, kwargs, out)
        for result in tensors_in(out):
            tracer.allocations.allocated(result)
        if count := _flop_counts().get(func.overloadpacket):
            tracer.count(count(*args, **kwargs, out_val=out))
            tracer.allocations.workspace(kernel_workspace(func, args, out, tracer.device_type))
        return out

    def _to_host(self, tensor: Tensor, kwargs: dict[str, Any]) -> Tensor:
        """Return a copy of `tensor`, in the dtype in `kwargs` or its own, that counts as host memory: on the CPU if its
        values are known, else on meta, without values.
        """
        dtype = kwargs.get("dtype") or tensor.dtype
        value = self._tracer.values.value_of(tensor)
        moved = torch.empty_like(tensor, dtype=dtype) if value is None else value.to(dtype, copy=True)
        self._tracer.allocations.allocated(moved, on_host=True)
        return moved


class _FunctionMode(TorchFunctionMode):
    """Sees each function of torch, above autograd: those that must not be taken apart into operations."""

    def __init__(self, tracer: MetaTracer) -> None:
        super().__init__()
        self._tracer = tracer

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is F.scaled_dot_product_attention and (args[0] if args else kwargs["query"]).is_meta:
            call = meta_call_of_sdpa(*args, **kwargs)
            self._tracer.attention(call)
            return call.out.transpose(1, 2)
        if func is F.rms_norm and self._tracer.device_type != "cpu" and args[0].is_meta:
            # One kernel on accelerators; on meta it would be taken apart as on the CPU.
            return torch.empty_like(args[0])
        if func in _READERS and args[0].is_meta:
            value = self._tracer.values.value_of(args[0])
            if value is None:
                raise _unplannable(func.__name__, args[0])
            return func(value)
        if func in _FACTORIES and torch.device(kwargs.get("device") or "cpu").type == "meta":
            # torch fills no memory on meta, and the value would be lost.
            return func(*args, **{**kwargs, "device": "cpu"}).to("meta")
        return func(*args, **kwargs)


@functools.cache
def _needs_values(func: Any) -> bool:
    # Indexing needs values of masks alone; `_integer_indices` replaces those.
    return func.overloadpacket not in _INDEXED and any(tag in func.tags for tag in _NEEDS_VALUES)


def _goes_to_cpu(kwargs: Mapping[str, Any]) -> bool:
    device = kwargs.get("device")
    return device is not None and device.type == "cpu"


def _by_value(values: KnownValues, func: Any, args: Any, kwargs: Any) -> tuple[Any] | None:
    """Return a tuple of one item, the result on meta of an operation that needs the values of its arguments; None if no
    argument is on meta.

    Raises:
        Unplannable: a value is not known.
    """
    inputs = tensors_in(args, kwargs)
    known = values.on_cpu(args, kwargs)
    if known is None:
        raise _unplannable(str(func), inputs[0])
    if not any(tensor.is_meta for tensor in inputs):
        return None

    def on_meta(result: Tensor) -> Tensor:
        made = torch.empty_strided(result.shape, result.stride(), dtype=result.dtype, device="meta")
        values.set_value(made, result)
        return made

    return (tree_map_only(Tensor, on_meta, func(*known[0], **known[1])),)


def _unplannable(what: str, tensor: Tensor) -> Unplannable:
    return Unplannable(
        f"{what} needs the values of a tensor of shape {tuple(tensor.shape)}, which depend on weights or pixels; "
        "a plan knows only values that follow from the arguments of a call. Run the call instead, and measure its peak"
    )


def _as_meta(values: KnownValues) -> Callable[[Tensor], Tensor]:
    """Return a function tensor -> tensor on meta of the same shape, with its values kept if known; it returns tensors
    on meta or without axes as they are.

    torch allows those beside meta tensors.
    """

    def moved(tensor: Tensor) -> Tensor:
        if tensor.is_meta or tensor.ndim == 0:
            return tensor
        made = torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device="meta")
        if (value := values.value_of(tensor)) is not None:
            values.set_value(made, value)
        return made

    return moved


def _integer_indices(values: KnownValues, indices: Sequence[Tensor | None]) -> list[Tensor | None]:
    """Return a list of the items of `indices`, with each mask of n axes replaced by n integer tensors: the positions
    along each axis at which it is True.
    """
    integers: list[Tensor | None] = []
    for index in indices:
        if index is None or index.dtype not in (torch.bool, torch.uint8):
            integers.append(index)
            continue
        (positions,) = _by_value(values, _aten.nonzero.default, (index,), {}) or (index.nonzero(),)
        value = values.value_of(positions)
        assert value is not None
        for axis in range(index.ndim):
            along_axis = positions[:, axis]
            values.set_value(along_axis, value[:, axis])
            integers.append(along_axis)
    return integers
