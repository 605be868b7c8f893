"""A module whose blocks come and go: `wrap` makes it, and it changes no bit of what the module computes."""

from __future__ import annotations

import fnmatch
import functools
import threading
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, NoReturn

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from diffsynth.core import device as devices
from diffsynth.core import forward_chain
from diffsynth.core.forward_chain import ForwardLayer
from diffsynth.core.loader.file_prefetcher import FilePrefetcher
from diffsynth.core.loader.reader.source import ComponentSource
from diffsynth.core.planning.workload import BlockFootprint, ComponentFootprint
from diffsynth.core.vram.block_weights import BlockWeights, DiskWeights, HostWeights, PinnedPool, check_source
from diffsynth.core.vram.packing import Packing
from diffsynth.core.vram.parameters import REST, away, buffers_of, frozen, places_of, read_buffers
from diffsynth.core.vram.partition import SMALL, Block, partition
from diffsynth.core.vram.policy import BlockState, Placement, Policy
from diffsynth.core.vram.report import TransferReport
from diffsynth.core.vram.resident_blocks import ResidentBlocks
from diffsynth.core.vram.stream import BlockOrder, BlockStream
from diffsynth.errors import did_you_mean

if TYPE_CHECKING:
    from diffsynth.core.vram.loaded_modules import OverlappedSwap

SLOTS = 2
"""Blocks that are on the device at once unless a plan says otherwise: one computes, the next is on its way."""

_ATTRIBUTE = "_diffsynth_managed"
_FLAG = "vram_management_enabled"
"""What older code asks a module for."""


def managed(module: nn.Module) -> ManagedModule | None:
    """What `wrap` made of a module, if it is wrapped."""
    return vars(module).get(_ATTRIBUTE)


def wrap(
    module: nn.Module,
    policy: Policy,
    *,
    source: ComponentSource | None = None,
    repeated: Sequence[str] = (),
    atomic: tuple[type, ...] = (),
    whole: tuple[type, ...] = (),
    smallest: int = SMALL,
    high_precision: Sequence[str] = (),
) -> ManagedModule:
    """Put a module under a policy; its classes, its names and its results stay what they are.

        managed = wrap(model, Policy.preset("cpu-offload", "cuda"))
        with managed:
            output = model(inputs.to("cuda"))

    Args:
        module: frozen, in eval mode. With a source it may be on meta.
        policy: where its weights are in which state.
        source: its weights on disk; without one they are what the module holds, and a policy may not name the disk.
        repeated, atomic, whole, smallest: where it may be cut; see `partition`.
        high_precision: name patterns of parameters that keep their dtype where storage is narrower than 16 bits.

    Raises:
        ValueError: the module is wrapped already, learns, is a tensor subclass's, or is to wait on disk without a
            source that can be read block by block.
    """
    if managed(module) is not None:
        raise ValueError(f"this {type(module).__name__} is wrapped already; managed(module) gives what wraps it")
    check_source(policy, source, type(module).__name__)
    for name, parameter in module.named_parameters():
        if parameter.requires_grad:
            raise ValueError(f"{name} learns; only frozen weights can come and go: module.requires_grad_(False)")
        if type(parameter.data) is not Tensor:
            raise ValueError(f"{name} is a {type(parameter.data).__name__}; expected a plain tensor")
    blocks = partition(module, repeated=repeated, atomic=atomic, whole=whole, smallest=smallest).blocks
    for block in blocks:
        if forward_chain.find(block.module, ForwardLayer.STREAMING) is not None:
            raise ValueError(f"{block.name} is a block of another wrapped module; unwrap that first")
    made = ManagedModule(
        module,
        policy,
        blocks=blocks,
        source=source,
        high_precision=high_precision,
    )
    vars(module)[_ATTRIBUTE] = made
    vars(module)[_FLAG] = True
    return made


class ManagedModule:
    """The lifetime of a wrapped module: `wrap` gives it, `unwrap()` ends it.

    `enter()` is the beginning of a stage that uses the module and `leave()` its end; `with` does both. The module may
    be called without: it enters by itself and stays until `leave()`. Threads take turns, block by block.
    """

    def __init__(
        self,
        module: nn.Module,
        policy: Policy,
        *,
        blocks: Sequence[Block],
        source: ComponentSource | None,
        high_precision: Sequence[str],
    ) -> None:
        self.module = module
        self.policy = policy
        self.report = TransferReport()
        self.slots = SLOTS
        self.resident: frozenset[str] | None = None
        self.swap: OverlappedSwap | None = None
        self._lock = threading.RLock()
        self._blocks = {block.name: block for block in blocks}
        self._source = source
        self._state = BlockState.OFFLOAD
        self._bound: str | None = None
        self._residents = ResidentBlocks(policy.device, self.report)
        self._views: dict[tuple[str, int], dict[str, nn.Parameter]] = {}
        self._stream: BlockStream | None = None
        self._prefetcher: FilePrefetcher | None = None
        self._order = BlockOrder(tuple(self._blocks))
        self._computed = torch.empty(0, dtype=torch.uint8)
        self._places = places_of(module, self._blocks)
        self._packings = {name: self._packing(name, high_precision) for name in self._places}
        # What a block was given when the module was made or read; nothing is kept twice.
        self._weights_of: dict[str, BlockWeights] = self._first_weights()
        self._rest_parameters = {name: self._at_rest(name) for name in self._places}
        for name in self._places:
            self._bind(name, self._rest_parameters[name])
        if source is not None:
            read_buffers(module, source)
        self._install()

    @property
    def state(self) -> BlockState:
        """OFFLOAD, ONLOAD between blocks, COMPUTATION inside one."""
        return BlockState.COMPUTATION if self._bound is not None else self._state

    @property
    def blocks(self) -> tuple[str, ...]:
        """Names of the blocks."""
        return tuple(self._blocks)

    @property
    def streamed(self) -> tuple[str, ...]:
        """Blocks that are away between their turns, as it is configured."""
        return tuple(name for name in self._blocks if not self._stays(name))

    @property
    def device_bytes(self) -> int:
        """Bytes that the component holds on its device now."""
        own = {
            memory.untyped_storage().data_ptr(): memory.numel() for memory in self._residents if self._is_ours(memory)
        }
        slots = self._stream.device_bytes if self._stream is not None else 0
        return sum(own.values()) + slots + self._computed.numel()

    def footprint(self, role: str = "") -> ComponentFootprint:
        """What its weights take, for a plan."""
        rest = self._packings[REST]
        buffers = sum(buffer.numel() * buffer.element_size() for _, _, buffer in buffers_of(self.module))
        packed = [(name, self._packings[name]) for name in self._blocks]
        return ComponentFootprint(
            role,
            tuple(BlockFootprint(name, packing.stored_bytes, packing.computed_bytes) for name, packing in packed),
            rest.computed_bytes + buffers,
            rest.stored_bytes + buffers,
        )

    def configure(self, *, resident: Collection[str] | None, slots: int) -> None:
        """What the next stage keeps on the device.

        Args:
            resident: blocks that stay for the whole stage; None is all. A policy that keeps nothing ready, or
                everything, has the last word.
            slots: blocks on the device at once among the others, at least 1.

        Raises:
            ValueError: an unknown block, or no slot.
        """
        for name in resident or ():
            if name not in self._blocks:
                raise ValueError(f"there is no block {name!r}{did_you_mean(name, self._blocks)}")
        if slots < 1:
            raise ValueError(f"slots={slots}: expected 1 or more")
        chosen = None if resident is None else frozenset(resident)
        with self._lock:
            if (chosen, slots) != (self.resident, self.slots):
                self.leave()
                self.resident, self.slots = chosen, slots

    def prepare(self) -> None:
        """A hint that a stage begins soon: meanwhile a thread has the system cache what `enter()` will read from disk.

        Takes no memory of the process and changes no weight. Weights in host memory have nothing to prepare.
        """
        with self._lock:
            waits = self._state is BlockState.OFFLOAD and self.policy.offload.on_disk
            if waits and self._source is not None and self._prefetcher is None:
                self._prefetcher = FilePrefetcher(self._source)

    def enter(self) -> None:
        """A stage begins: what stays on the device goes there, the first blocks set out."""
        with self._lock:
            self._dismiss()
            if self._state is not BlockState.OFFLOAD:
                return
            try:
                self._onload()
            except BaseException:
                self._drop()
                raise

    def leave(self) -> None:
        """The stage is over: nothing of the module is on the device any more."""
        with self._lock:
            self._dismiss()
            if self._state is BlockState.OFFLOAD:
                self._residents.drop()
            else:
                self._drop()

    def begin_round(self, *, forgets: bool = False) -> None:
        """A step of a loop begins: how often blocks run in it is counted, and expected of the next one.

        Args:
            forgets: what ran before was no step of this loop.
        """
        self._order.begin_round(forgets=forgets)

    def expected_runs(self, name: str) -> int:
        """How often a block ran in the step before this one."""
        return self._order.runs_before(name)

    def to_send(self) -> list[tuple[str, int]]:
        """Blocks that could set out now for a stage that has not begun, and their bytes."""
        if self._state is not BlockState.OFFLOAD:
            return []
        away = [name for name in self._blocks if name not in self._residents and self._stays(name)]
        return [
            (name, self._packings[name].stored_bytes)
            for name in away
            if self._residents.can_send(self._weights_of[name])
        ]

    def send(self, name: str) -> None:
        """Have one of `to_send()` set out: it arrives while the device computes, and stays like those of the stage."""
        with self._lock:
            self._residents.send(name, self._weights_of[name])

    def let_go(self, name: str) -> int:
        """Have a block leave before its stage ends, since it is not expected to run again; gives the bytes it took."""
        with self._lock:
            if self._stream is not None:
                self._stream.finish(name)
            if self._state is BlockState.OFFLOAD or name not in self._residents:
                return 0
            self._residents.drop([name])
            self._views = {key: views for key, views in self._views.items() if key[0] != name}
            return self._packings[name].stored_bytes

    def unwrap(self) -> nn.Module:
        """End it: the module is an ordinary one again, on the CPU, in the dtypes it is stored in.

        Weights that were on disk stay on meta.
        """
        with self._lock:
            self.leave()
            for part in (self.module, *(block.module for block in self._blocks.values())):
                forward_chain.remove(part, ForwardLayer.STREAMING)
            for name in (_ATTRIBUTE, _FLAG):
                vars(self.module).pop(name, None)
            for name, packing in self._packings.items():
                memory = self._weights_of[name].memory
                if memory is None:
                    self._bind(name, frozen(self._on_meta(packing)))
                elif memory.is_pinned():
                    # Pinned memory is for transfers, and there will be none.
                    self._bind(name, frozen(packing.stored_views(memory.clone())))
        return self.module

    def __enter__(self) -> ManagedModule:
        self.enter()
        return self

    def __exit__(self, *error: object) -> None:
        self.leave()

    def __deepcopy__(self, memo: object) -> NoReturn:
        raise TypeError(
            f"this {type(self.module).__name__} is wrapped, and a copy would move the same weights: copy it before "
            "wrap(), or after managed(module).unwrap()"
        )

    def _dismiss(self) -> None:
        if self._prefetcher is not None:
            self._prefetcher.stop()
            self._prefetcher = None

    def _onload(self) -> None:
        self._state = BlockState.ONLOAD
        self._order.begin()
        if self.policy.offload.on_disk and not self.policy.onload.on_disk:
            self._weights_of = self._read_all(self._weights_of)
        streamed = {}
        for name in self._places:
            if name == REST or self._stays(name):
                self._bring(name)
            else:
                streamed[name] = self._weights_of[name]
        if streamed:
            self._stream = BlockStream(
                streamed, self.policy.device, slots=self.slots, order=self._order, report=self.report
            )
        size = max((p.computed_bytes for name, p in self._packings.items() if name != REST and p.converts), default=0)
        self._computed = torch.empty(size, dtype=torch.uint8, device=self.policy.device)
        self._bind(REST, frozen(self._packings[REST].computed_views(self._bring(REST))))
        for part, key, buffer in buffers_of(self.module):
            part._buffers[key] = buffer.to(self.policy.device)

    def _drop(self) -> None:
        if self._bound is not None:
            self._unbind(self._bound)
        if self._stream is not None:
            self._stream.close()
            self._stream = None
        self._residents.drop()
        self._views.clear()
        self._computed = torch.empty(0, dtype=torch.uint8)
        self._bind(REST, self._rest_parameters[REST])
        for part, key, buffer in buffers_of(self.module):
            part._buffers[key] = buffer.to("cpu")
        if self._source is not None and self.policy.offload.on_disk:
            self._weights_of = {name: DiskWeights(packing, self._source) for name, packing in self._packings.items()}
        self._state = BlockState.OFFLOAD

    def _stays(self, name: str) -> bool:
        onload: Placement = self.policy.onload
        in_place = self.policy.device.type == "cpu" and self._weights_of[name].memory is not None
        if in_place or (not onload.on_disk and devices.check_device(onload.device).type == self.policy.device.type):
            return True
        return self.policy.keeps_ready and (self.resident is None or name in self.resident)

    def _bring(self, name: str) -> Tensor:
        """Packed weights on the device, for the stage; those outside blocks as they are computed with."""
        return self._residents.bring(name, self._weights_of[name], converted=name == REST)

    @contextmanager
    def _turn(self, name: str) -> Iterator[int | None]:
        """The weights of a block are in place inside the `with`; gives the memory that others will use after it."""
        with self._lock:
            self.enter()
            self._order.saw(name)
            with self._weights(name) as (memory, is_lent):
                key = (name, memory.data_ptr())
                if key not in self._views:
                    self._views[key] = frozen(self._packings[name].computed_views(memory))
                try:
                    self._bound = name
                    self._bind(name, self._views[key])
                    yield memory.untyped_storage().data_ptr() if is_lent else None
                finally:
                    self._unbind(name)

    @contextmanager
    def _weights(self, name: str) -> Iterator[tuple[Tensor, bool]]:
        """A block's weights as they are computed with, and whether their memory will be another block's."""
        packing, ready = self._packings[name], self._residents.get(name)
        if ready is None and self._stays(name):
            # It was let go too early.
            if self.swap is not None:
                self.swap.withdraw()
            ready = self._bring(name)
        if ready is not None:
            stored, release = ready, None
        else:
            assert self._stream is not None
            stored, release = self._stream.acquire(name), self._stream.release
        try:
            if packing.converts:
                packing.convert(stored, self._computed)
                if release is not None:
                    # What was converted is not read again, so the next block may set out already.
                    release(name)
                    release = None
                yield self._computed, True
            else:
                yield stored, release is not None
        finally:
            if release is not None:
                release(name)

    def _run(self, name: str, forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """A block's forward with its weights there."""
        if torch.compiler.is_compiling():
            raise RuntimeError(f"{name} is streamed, which cannot be compiled from outside; compile its blocks instead")
        if torch.is_grad_enabled() and any(_wants_grad(value) for value in pytree.tree_leaves((args, kwargs))):
            raise RuntimeError(
                f"{name} would be gone by the time its gradient is wanted; run it under torch.no_grad(), or do not "
                "wrap a module that gradients pass through"
            )
        with self._turn(name) as lent:
            output = forward(*args, **kwargs)
            # A block may give out a weight, or a part of one; its memory is about to be another block's.
            output = pytree.tree_map(lambda value: value.clone() if _is_in(value, lent) else value, output)
        if self.swap is not None:
            self.swap.ran(self, name)
        return output

    def _enter_and_run(self, forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        self.enter()
        return forward(*args, **kwargs)

    def _install(self) -> None:
        enter = functools.partial(functools.partial, self._enter_and_run)
        forward_chain.install(self.module, ForwardLayer.STREAMING, enter)
        for name, block in self._blocks.items():
            run = functools.partial(functools.partial, self._run, name)
            forward_chain.install(block.module, ForwardLayer.STREAMING, run)

    def _bind(self, name: str, parameters: dict[str, nn.Parameter]) -> None:
        for part, key, full in self._places[name]:
            part._parameters[key] = parameters[full]

    def _unbind(self, name: str) -> None:
        self._bind(name, self._rest_parameters[name])
        self._bound = None

    def _packing(self, name: str, high_precision: Sequence[str]) -> Packing:
        tensors = {full: part._parameters[key] for part, key, full in self._places[name]}
        return Packing(tensors, {full: self._dtypes(full, tensor, high_precision) for full, tensor in tensors.items()})

    def _dtypes(self, name: str, tensor: Tensor, high_precision: Sequence[str]) -> tuple[torch.dtype, torch.dtype]:
        own = tensor.dtype
        if not own.is_floating_point:
            return own, own
        stored, computed = self.policy.stored_dtype(own), self.policy.computed_dtype(own)
        if stored.itemsize < 2 <= own.itemsize and any(fnmatch.fnmatchcase(name, each) for each in high_precision):
            stored = min(own, computed, key=lambda dtype: dtype.itemsize)
        return stored, computed

    def _first_weights(self) -> dict[str, BlockWeights]:
        if self._source is not None:
            on_disk = {name: DiskWeights(packing, self._source) for name, packing in self._packings.items()}
            if self.policy.offload.on_disk:
                return dict(on_disk)
            return self._read_all(on_disk)
        weights: dict[str, BlockWeights] = {}
        pool = self._pool()
        for name, places in self._places.items():
            tensors = {full: part._parameters[key] for part, key, full in places}
            packing = self._packings[name]
            memory = pool.take(packing.stored_bytes)
            weights[name] = HostWeights.copy(packing, tensors, memory)
            # At once, so that no more than one block is in memory twice.
            self._bind(name, frozen(packing.stored_views(memory)))
        return weights

    def _read_all(self, weights: Mapping[str, BlockWeights]) -> dict[str, BlockWeights]:
        pool = self._pool()
        return {name: HostWeights.read(each, pool.take(each.packing.stored_bytes)) for name, each in weights.items()}

    def _pool(self) -> PinnedPool:
        """Pinned if that leaves the host half of what is free."""
        sizes = [packing.stored_bytes for packing in self._packings.values()]
        free = devices.available_memory("cpu")
        return PinnedPool(sizes, self.policy.device, lock=free is None or 2 * sum(sizes) < free)

    def _at_rest(self, name: str) -> dict[str, nn.Parameter]:
        """What stands in the module while a block is not in use."""
        packing, memory = self._packings[name], self._weights_of[name].memory
        if memory is not None:
            return frozen(packing.stored_views(memory))
        return away(self._on_meta(packing))

    @staticmethod
    def _on_meta(packing: Packing) -> dict[str, Tensor]:
        return packing.computed_views(torch.empty(packing.computed_bytes, dtype=torch.uint8, device="meta"))

    def _is_ours(self, memory: Tensor) -> bool:
        return all(memory is not weights.memory for weights in self._weights_of.values())


def _wants_grad(value: Any) -> bool:
    return isinstance(value, Tensor) and value.requires_grad


def _is_in(value: Any, memory: int | None) -> bool:
    return isinstance(value, Tensor) and memory is not None and value.untyped_storage().data_ptr() == memory
