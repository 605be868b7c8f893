"""The rehearsal itself: operations on the meta device, watched."""

from __future__ import annotations

import functools
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only
from torch.utils.flop_counter import flop_registry

from diffsynth.core.attention.meta import MetaCall, meta_call_of_sdpa, observed_meta_calls
from diffsynth.core.planning.allocations import AllocationTracker
from diffsynth.core.planning.kernel_workspace import workspace
from diffsynth.core.planning.known_values import KnownValues, tensors_in
from diffsynth.core.planning.meta_results import MetaResultCache
from diffsynth.core.planning.repeated_calls import RepeatedCalls
from diffsynth.core.repeats import made_by
from diffsynth.errors import Unplannable

_aten = torch.ops.aten
_FACTORIES = (torch.tensor, torch.as_tensor, torch.asarray)
_READERS = (Tensor.tolist, Tensor.numpy)
_NEEDS_VALUES = (torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape)
_INDEXED = (_aten.index, _aten.index_put, _aten.index_put_)


@dataclass(frozen=True)
class BlockTrace:
    """One run of a block.

    Args:
        role: of its component.
        block: its name in the component.
        flops: floating-point operations of its matrix products, convolutions and attention.
    """

    role: str
    block: str
    flops: int


@dataclass
class StageTrace:
    """What one stage took.

    Args:
        name: of the stage.
        device_bytes: the most that was alive on the device at once, weights not counted.
        host_bytes: the same in host memory.
        flops: of everything in it, blocks included.
        visits: blocks in the order they ran.
    """

    name: str
    device_bytes: int = 0
    host_bytes: int = 0
    flops: int = 0
    blocks_run: list[BlockTrace] = field(default_factory=list)


class MetaTracer:
    """Watches code that runs on the meta device inside `with rehearsal:`.

    Args:
        device_type: of the device that is meant, "cuda" or "cpu"; kernels there take different workspaces.
        components: role -> module, all on meta.
        blocks: role -> the blocks whose runs are noted, by name.
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
        self._running: list[tuple[str, str, int]] = []
        self._exit = ExitStack()
        for module in components.values():
            self.allocations.ignore((*module.parameters(), *module.buffers()))

    def __enter__(self) -> MetaTracer:
        with ExitStack() as entered:
            for role, blocks in self._blocks.items():
                for name, module in blocks.items():
                    self._note_runs(entered, role, name, module)
            entered.enter_context(observed_meta_calls(self._attention))
            entered.enter_context(made_by(RepeatedCalls(self)))
            entered.enter_context(_Calls(self))
            entered.enter_context(_Operations(self))
            self._exit = entered.pop_all()
        return self

    def __exit__(self, *error: object) -> None:
        self._exit.close()

    @contextmanager
    def stage(self, name: str) -> Iterator[StageTrace]:
        """What happens inside belongs to this stage; stages follow each other and are kept in `stages`."""
        stage = StageTrace(name)
        self.stages.append(stage)
        self.allocations.restart_peak()
        yield stage
        stage.device_bytes, stage.host_bytes = self.allocations.peak["device"], self.allocations.peak["host"]

    def count(self, flops: int) -> None:
        """Add floating-point operations to the stage, and so to the block that runs."""
        if self.stages:
            self.stages[-1].flops += flops

    def _attention(self, call: MetaCall) -> None:
        self.allocations.allocated(call.out)
        self.allocations.scratch(call.workspace(self.device_type))
        self.count(call.flops)

    def _note_runs(self, entered: ExitStack, role: str, name: str, module: nn.Module) -> None:
        def begins(*_: object) -> None:
            if self.stages:
                self._running.append((role, name, self.stages[-1].flops))

        def ends(*_: object) -> None:
            if self.stages:
                _, _, before = self._running.pop()
                self.stages[-1].blocks_run.append(BlockTrace(role, name, self.stages[-1].flops - before))

        entered.callback(module.register_forward_pre_hook(begins).remove)
        entered.callback(module.register_forward_hook(ends).remove)


class _Operations(TorchDispatchMode):
    """Below autograd: every operation of torch, one at a time."""

    def __init__(self, tracer: MetaTracer) -> None:
        super().__init__()
        self._tracer = tracer
        self._results = MetaResultCache()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        watcher, values = self._tracer, self._tracer.values
        inputs = tensors_in(args, kwargs)
        if _needs_values(func) and (known := _by_value(values, func, args, kwargs)):
            return known[0]
        if func is _aten._to_copy.default and inputs[0].is_meta and _goes_to_cpu(kwargs):
            return self._to_host(inputs[0], kwargs)
        if any(tensor.is_meta for tensor in inputs):
            if func is _aten.copy_.default and not args[0].is_meta:
                values.spoil(func, args, kwargs)
                return args[0]
            if not all(tensor.is_meta for tensor in inputs):
                args, kwargs = tree_map_only(Tensor, _as_meta(values), (args, kwargs))
            if func.overloadpacket in _INDEXED:
                args = (args[0], _long_indices(values, func, args[1]), *args[2:])
        out = self._results(func, args, kwargs)
        values.follow(func, args, kwargs, out)
        for result in tensors_in(out):
            watcher.allocations.allocated(result)
        if count := flop_registry.get(func.overloadpacket):
            watcher.count(count(*args, **kwargs, out_val=out))
            watcher.allocations.scratch(workspace(func, args, out, watcher.device_type))
        return out

    def _to_host(self, tensor: Tensor, kwargs: dict[str, Any]) -> Tensor:
        """A real tensor where the value is known. Elsewhere it stays on meta, in the account of the host."""
        dtype = kwargs.get("dtype") or tensor.dtype
        twin = self._tracer.values.of(tensor)
        moved = torch.empty_like(tensor, dtype=dtype) if twin is None else twin.to(dtype, copy=True)
        self._tracer.allocations.allocated(moved, on_host=True)
        return moved


class _Calls(TorchFunctionMode):
    """Above autograd: calls that must not be taken apart into operations."""

    def __init__(self, tracer: MetaTracer) -> None:
        super().__init__()
        self._tracer = tracer

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is F.scaled_dot_product_attention and (args[0] if args else kwargs["query"]).is_meta:
            call = meta_call_of_sdpa(*args, **kwargs)
            self._tracer._attention(call)
            return call.out.transpose(1, 2)
        if func is F.rms_norm and self._tracer.device_type != "cpu" and args[0].is_meta:
            # One kernel on accelerators; on meta it would be taken apart as on the CPU.
            return torch.empty_like(args[0])
        if func in _READERS and args[0].is_meta:
            return func(_known(self._tracer.values, func.__name__, args[0]))
        if func in _FACTORIES and torch.device(kwargs.get("device") or "cpu").type == "meta":
            # torch fills no memory on meta, and the value would be lost.
            return func(*args, **{**kwargs, "device": "cpu"}).to("meta")
        return func(*args, **kwargs)


@functools.cache
def _needs_values(func: Any) -> bool:
    # Indexing does with masks alone, which become places.
    return func.overloadpacket not in _INDEXED and any(tag in func.tags for tag in _NEEDS_VALUES)


def _goes_to_cpu(kwargs: Mapping[str, Any]) -> bool:
    device = kwargs.get("device")
    return device is not None and device.type == "cpu"


def _by_value(values: KnownValues, func: Any, args: Any, kwargs: Any) -> tuple[Any] | None:
    """The result, in a tuple, of an operation that depends on values; None if nothing in it is on meta.

    Raises:
        Unplannable: a value is not known.
    """
    inputs = tensors_in(args, kwargs)
    known = values.arguments(args, kwargs)
    if known is None:
        raise _unplannable(str(func), inputs[0])
    if not any(tensor.is_meta for tensor in inputs):
        return None

    def on_meta(result: Tensor) -> Tensor:
        made = torch.empty_strided(result.shape, result.stride(), dtype=result.dtype, device="meta")
        values.learn(made, result)
        return made

    return (tree_map_only(Tensor, on_meta, func(*known[0], **known[1])),)


def _known(values: KnownValues, what: str, tensor: Tensor) -> Tensor:
    """The value of a tensor.

    Raises:
        Unplannable: it is not known.
    """
    twin = values.of(tensor)
    if twin is None:
        raise _unplannable(what, tensor)
    return twin


def _unplannable(what: str, tensor: Tensor) -> Unplannable:
    return Unplannable(
        f"{what} asks for the values of a tensor of shape {tuple(tensor.shape)} that depends on weights or pixels; "
        f"a plan knows only values that follow from the arguments of a call. Run it instead, and look at the peak"
    )


def _as_meta(values: KnownValues) -> Any:
    """Beside tensors on meta all are, but for single numbers."""

    def change(tensor: Tensor) -> Tensor:
        if tensor.is_meta or tensor.ndim == 0:
            return tensor
        made = torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device="meta")
        if (twin := values.of(tensor)) is not None:
            values.learn(made, twin)
        return made

    return change


def _long_indices(values: KnownValues, func: Any, indices: Sequence[Tensor | None]) -> list[Tensor | None]:
    """Indices with masks replaced by the places where they are True."""
    long: list[Tensor | None] = []
    for index in indices:
        if index is None or index.dtype not in (torch.bool, torch.uint8):
            long.append(index)
            continue
        (places,) = _by_value(values, _aten.nonzero.default, (index,), {}) or (index.nonzero(),)
        for axis in range(index.ndim):
            long.append(places[:, axis])
            twin = values.of(places)
            assert twin is not None
            values.learn(long[-1], twin[:, axis])
    return long
