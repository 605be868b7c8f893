"""A wrapped module: its blocks are streamed, or stay on the device for a stage. Wrapping changes no bit of a result."""

from __future__ import annotations

import fnmatch
import functools
import threading
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, NoReturn, Protocol

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from diffsynth.core import device as devices
from diffsynth.core import forward_chain
from diffsynth.core.forward_chain import ForwardLayer
from diffsynth.core.loader.file_prefetcher import FilePrefetcher
from diffsynth.core.loader.reader.source import WeightSource
from diffsynth.core.planning.workload import BlockFootprint, ComponentFootprint
from diffsynth.core.vram.block_weights import BlockWeights, DiskWeights, HostWeights, PinnedPool, check_source
from diffsynth.core.vram.packing import Packing
from diffsynth.core.vram.parameters import (
    REST,
    buffers_of,
    frozen_parameters,
    parameter_locations,
    read_buffers,
    unloaded_parameters,
)
from diffsynth.core.vram.partition import SMALL, Block, partition
from diffsynth.core.vram.policy import BlockState, Placement, Policy
from diffsynth.core.vram.report import TransferReport
from diffsynth.core.vram.resident_blocks import ResidentBlocks
from diffsynth.core.vram.stream import BlockOrder, BlockStream
from diffsynth.errors import did_you_mean

DEFAULT_SLOTS = 2
"""Streamed blocks that are on the device at once unless a plan says otherwise: one computes, the next is copied."""

_ATTRIBUTE = "_diffsynth_managed"
_FLAG = "vram_management_enabled"
"""The attribute by which older code recognizes a wrapped module."""


class BlockSwap(Protocol):
    """Follows the calls of a module's blocks in the last step of its stage; see `OverlappedSwap`."""

    def block_called(self, module: ManagedModule, name: str) -> None:
        """Record that a call of block `name` of `module` has ended; the implementation may then free that block on the
        device and prefetch others.
        """

    def evicted_too_early(self) -> None:
        """Free the device memory of blocks that were prefetched for the next stage, because an evicted block is called
        again and must be loaded.
        """


def managed(module: nn.Module) -> ManagedModule | None:
    """Return the `ManagedModule` that `wrap` made for `module`; None if the module is not wrapped."""
    return vars(module).get(_ATTRIBUTE)


def wrap(
    module: nn.Module,
    policy: Policy,
    *,
    source: WeightSource | None = None,
    repeated: Sequence[str] = (),
    atomic: tuple[type, ...] = (),
    whole: tuple[type, ...] = (),
    smallest: int = SMALL,
    high_precision: Sequence[str] = (),
) -> ManagedModule:
    """Put `module` under a placement policy (devices and dtypes of its weights), in place, and return its
    `ManagedModule`.

    The module's classes, its names and its results stay the same.

        managed = wrap(model, Policy.preset("cpu-offload", "cuda"))
        with managed:
            output = model(inputs.to("cuda"))

    Args:
        module: the module, frozen and in eval mode. With a source it may be on meta.
        policy: placement of the weights in each state.
        source: reads the weights from their file. Without one the weights of the module are used, and the policy may
            not store them on disk.
        repeated: names of the lists whose items are blocks; see `partition`.
        atomic: classes of modules that are never cut; see `partition`.
        whole: classes of modules that are blocks; see `partition`.
        smallest: bytes below which a module is no block; see `partition`.
        high_precision: name patterns of parameters that keep their dtype where storage is narrower than 16 bits.

    Raises:
        ValueError: the module, or a block of it, is wrapped already; a parameter requires gradients or is of a tensor
            subclass; the policy stores weights on disk, and there is no source that can be read block by block.
    """
    if managed(module) is not None:
        raise ValueError(f"this {type(module).__name__} is wrapped already; managed(module) returns its ManagedModule")
    check_source(policy, source, type(module).__name__)
    for name, parameter in module.named_parameters():
        if parameter.requires_grad:
            raise ValueError(f"{name} requires gradients; only frozen weights are moved: module.requires_grad_(False)")
        if type(parameter.data) is not Tensor:
            raise ValueError(f"{name} is a {type(parameter.data).__name__}; expected a plain tensor")
    blocks = partition(module, repeated=repeated, atomic=atomic, whole=whole, smallest=smallest).blocks
    for name, part in ((type(module).__name__, module), *((block.name, block.module) for block in blocks)):
        if forward_chain.find(part, ForwardLayer.STREAMING) is not None:
            raise ValueError(f"{name} is wrapped as a part of another module; unwrap that module first")
    made = ManagedModule(module, policy, blocks=blocks, source=source, high_precision=high_precision)
    vars(module)[_ATTRIBUTE] = made
    vars(module)[_FLAG] = True
    return made


class ManagedModule:
    """A wrapped module, from `wrap` to `unwrap()`.

    `enter()` begins a stage that uses the module and `leave()` ends it; `with` does both. The module may be called
    without a stage: the call begins one, which lasts until `leave()`. Calls of several threads run block by block, one
    at a time.

    Attributes:
        module: the wrapped module.
        policy: its policy.
        report: counts its transfers.
        slots: number of streamed blocks on the device at once; see `configure`.
        resident: names of the blocks that stay on the device for a stage; None is all.
        swap: follows the calls of blocks while the module is swapped for another one.
    """

    def __init__(
        self,
        module: nn.Module,
        policy: Policy,
        *,
        blocks: Sequence[Block],
        source: WeightSource | None,
        high_precision: Sequence[str],
    ) -> None:
        self.module = module
        self.policy = policy
        self.report = TransferReport()
        self.slots = DEFAULT_SLOTS
        self.resident: frozenset[str] | None = None
        self.swap: BlockSwap | None = None
        self._lock = threading.RLock()
        self._blocks = {block.name: block for block in blocks}
        self._source = source
        self._state = BlockState.OFFLOAD
        self._running: str | None = None
        self._resident_blocks = ResidentBlocks(policy.device, self.report)
        self._views: dict[tuple[str, int], dict[str, nn.Parameter]] = {}
        self._stream: BlockStream | None = None
        self._prefetcher: FilePrefetcher | None = None
        self._order = BlockOrder(tuple(self._blocks))
        self._converted = torch.empty(0, dtype=torch.uint8)
        self._locations = parameter_locations(module, self._blocks)
        self._packings = {name: self._packing(name, high_precision) for name in self._locations}
        # The weights as they are offloaded: of the module itself, or of its source; there is no second copy.
        self._block_weights: dict[str, BlockWeights] = self._first_weights()
        self._offloaded = {name: self._offloaded_parameters(name) for name in self._locations}
        for name in self._locations:
            self._bind(name, self._offloaded[name])
        if source is not None:
            read_buffers(module, source)
        enter = functools.partial(functools.partial, self._enter_and_run)
        forward_chain.install(module, ForwardLayer.STREAMING, enter)
        for block in blocks:
            run = functools.partial(functools.partial, self._run_block, block.name)
            forward_chain.install(block.module, ForwardLayer.STREAMING, run)

    @property
    def state(self) -> BlockState:
        """State of the module, a `BlockState`: OFFLOAD outside of a stage; in a stage COMPUTATION while a block runs,
        else ONLOAD.
        """
        return BlockState.COMPUTATION if self._running is not None else self._state

    @property
    def blocks(self) -> tuple[str, ...]:
        """Names of the blocks, a tuple of strings in the order of the module tree."""
        return tuple(self._blocks)

    @property
    def streamed(self) -> tuple[str, ...]:
        """Names of the blocks that are copied to the device for each of their calls under the current settings, a tuple
        of strings.
        """
        return tuple(name for name in self._blocks if not self._is_resident(name))

    @property
    def device_bytes(self) -> int:
        """Device memory that the module's weights take now, in bytes; empty slots (memory for streamed blocks) count,
        buffers do not.

        On the CPU, weights that are used where they are stored count 0.
        """
        own = {
            memory.untyped_storage().data_ptr(): memory.numel()
            for memory in self._resident_blocks
            if all(memory is not weights.memory for weights in self._block_weights.values())
        }
        slots = self._stream.device_bytes if self._stream is not None else 0
        return sum(own.values()) + slots + self._converted.numel()

    def footprint(self, role: str = "") -> ComponentFootprint:
        """Return a `ComponentFootprint`: bytes of each block, and of the weights and buffers outside blocks, as stored
        and as computed with.

        Args:
            role: name of the component in the plan.
        """
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
        """Set `resident`, names of the blocks that stay on the device (None: all), and `slots`, how many others are
        there at once; if either changes, a running stage ends.

        Args:
            resident: names of the blocks that stay for the whole stage; None is all. It has no effect under a policy
                whose `onload` is on the device (all stay) or whose `preparing` is not (none stays).
            slots: number of the other blocks that are on the device at once, at least 1.

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
        """Start a thread that reads the weights' file into the system's cache, if no stage runs and the next one will
        read weights from disk.

        A hint that a stage begins soon. It takes no memory of the process and changes no weight. Weights in host memory
        need no reading.
        """
        with self._lock:
            reads = self._state is BlockState.OFFLOAD and self.policy.offload.on_disk
            if reads and self._source is not None and self._prefetcher is None:
                self._prefetcher = FilePrefetcher(self._source)

    def enter(self) -> None:
        """Begin a stage, unless one runs: load the resident blocks and all that is outside blocks onto the device, and
        begin to copy the first streamed blocks.
        """
        with self._lock:
            self._stop_prefetcher()
            if self._state is not BlockState.OFFLOAD:
                return
            try:
                self._onload()
            except BaseException:
                self._offload()
                raise

    def leave(self) -> None:
        """End the stage, if one runs: free the copies of weights on the device and move buffers to the CPU; without a
        stage, free the prefetched blocks.
        """
        with self._lock:
            self._stop_prefetcher()
            if self._state is BlockState.OFFLOAD:
                self._resident_blocks.drop()
            else:
                self._offload()

    def begin_step(self, *, is_first: bool = False) -> None:
        """Begin a step of a loop: count calls of blocks from 0, and expect as many as in the step before (0 if
        `is_first`).

        Args:
            is_first: no step of this loop ran before.
        """
        self._order.begin_step(is_first=is_first)

    def expected_calls(self, name: str) -> int:
        """Return how often block `name` was called in the step before the current one, an int; 0 if there was none."""
        return self._order.calls_in_last_step(name)

    def prefetchable(self) -> list[tuple[str, int]]:
        """Return a list of (block name, bytes as stored) pairs: the blocks that can be copied now for the next stage;
        empty during a stage.
        """
        if self._state is not BlockState.OFFLOAD:
            return []
        return [
            (name, self._packings[name].stored_bytes)
            for name in self._blocks
            if name not in self._resident_blocks
            and self._is_resident(name)
            and self._resident_blocks.can_prefetch(self._block_weights[name])
        ]

    def prefetch(self, name: str) -> None:
        """Begin to copy block `name`, one of `prefetchable()`, to the device while other blocks compute; it stays there
        for the next stage.
        """
        with self._lock:
            self._resident_blocks.prefetch(name, self._block_weights[name])

    def evict(self, name: str) -> int:
        """Free the device memory of resident block `name` during a stage and return its bytes as stored; 0 outside of a
        stage or if it is not resident.

        The block is not expected to run again in the stage. A streamed block is not prefetched any more.
        """
        with self._lock:
            if self._stream is not None:
                self._stream.finish(name)
            if self._state is BlockState.OFFLOAD or name not in self._resident_blocks:
                return 0
            self._resident_blocks.drop([name])
            self._views = {key: views for key, views in self._views.items() if key[0] != name}
            return self._packings[name].stored_bytes

    def unwrap(self) -> nn.Module:
        """End the management and return the module: an ordinary one, whose weights are on the CPU in stored dtypes, or
        on meta if they were on disk.

        Weights that were on disk stay on meta. Other layers of its forward, such as compiled code, stay.
        """
        with self._lock:
            self.leave()
            for part in (self.module, *(block.module for block in self._blocks.values())):
                forward_chain.remove(part, ForwardLayer.STREAMING)
            for name in (_ATTRIBUTE, _FLAG):
                vars(self.module).pop(name, None)
            for name, packing in self._packings.items():
                memory = self._block_weights[name].memory
                if memory is None:
                    self._bind(name, frozen_parameters(_on_meta(packing)))
                elif memory.is_pinned():
                    # Pinned memory is for transfers, and there will be none.
                    self._bind(name, frozen_parameters(packing.stored_views(memory.clone())))
        return self.module

    def __enter__(self) -> ManagedModule:
        self.enter()
        return self

    def __exit__(self, *error: object) -> None:
        self.leave()

    def __reduce__(self) -> NoReturn:
        raise TypeError(
            f"this {type(self.module).__name__} is wrapped, and a copy, also a pickled one, would move the same "
            "weights: copy it before wrap(), or after managed(module).unwrap()"
        )

    def _stop_prefetcher(self) -> None:
        if self._prefetcher is not None:
            self._prefetcher.stop()
            self._prefetcher = None

    def _onload(self) -> None:
        self._state = BlockState.ONLOAD
        self._order.begin_stage()
        if self.policy.offload.on_disk and not self.policy.onload.on_disk:
            self._block_weights = self._read_all(self._block_weights)
        streamed = {}
        for name in self._locations:
            if name == REST or self._is_resident(name):
                self._load(name)
            else:
                streamed[name] = self._block_weights[name]
        if streamed:
            self._stream = BlockStream(
                streamed, self.policy.device, slots=self.slots, order=self._order, report=self.report
            )
        size = max((p.computed_bytes for name, p in self._packings.items() if name != REST and p.converts), default=0)
        self._converted = torch.empty(size, dtype=torch.uint8, device=self.policy.device)
        self._bind(REST, frozen_parameters(self._packings[REST].computed_views(self._load(REST))))
        for part, key, buffer in buffers_of(self.module):
            part._buffers[key] = buffer.to(self.policy.device)

    def _offload(self) -> None:
        if self._running is not None:
            self._unbind(self._running)
        if self._stream is not None:
            self._stream.close()
            self._stream = None
        self._resident_blocks.drop()
        self._views.clear()
        self._converted = torch.empty(0, dtype=torch.uint8)
        self._bind(REST, self._offloaded[REST])
        for part, key, buffer in buffers_of(self.module):
            part._buffers[key] = buffer.to("cpu")
        if self._source is not None and self.policy.offload.on_disk:
            self._block_weights = {name: DiskWeights(packing, self._source) for name, packing in self._packings.items()}
        self._state = BlockState.OFFLOAD

    def _is_resident(self, name: str) -> bool:
        onload: Placement = self.policy.onload
        is_in_place = self.policy.device.type == "cpu" and self._block_weights[name].memory is not None
        if is_in_place or (not onload.on_disk and devices.check_device(onload.device).type == self.policy.device.type):
            return True
        return self.policy.allows_resident and (self.resident is None or name in self.resident)

    def _load(self, name: str) -> Tensor:
        """Load the packed weights of block `name` onto the device, unless they are there, and return them, a uint8
        tensor: in computed dtypes for `REST` (outside blocks), else as stored.
        """
        return self._resident_blocks.load(name, self._block_weights[name], converted=name == REST)

    @contextmanager
    def _bound(self, name: str) -> Iterator[int | None]:
        """Context manager that binds a block's parameters on the device and yields the address of their memory, an int,
        if other blocks reuse it, else None.
        """
        with self._lock:
            self.enter()
            self._order.called(name)
            with self._on_device(name) as (memory, is_shared):
                key = (name, memory.data_ptr())
                if key not in self._views:
                    self._views[key] = frozen_parameters(self._packings[name].computed_views(memory))
                try:
                    self._running = name
                    self._bind(name, self._views[key])
                    yield memory.untyped_storage().data_ptr() if is_shared else None
                finally:
                    self._unbind(name)

    @contextmanager
    def _on_device(self, name: str) -> Iterator[tuple[Tensor, bool]]:
        """Context manager that yields (uint8 tensor, bool): a block's packed weights on the device, and whether that
        memory is reused.

        The weights are in computed dtypes; True means that other blocks use the memory afterwards.
        """
        packing, stored = self._packings[name], self._resident_blocks.get(name)
        if stored is None and self._is_resident(name):
            # It was evicted, and is called again after all.
            if self.swap is not None:
                self.swap.evicted_too_early()
            stored = self._load(name)
        release = None
        if stored is None:
            assert self._stream is not None
            stored, release = self._stream.acquire(name), self._stream.release
        try:
            if packing.converts:
                packing.convert(stored, self._converted)
                if release is not None:
                    # The stored weights are not read again, so the next block may take the slot already.
                    release(name)
                    release = None
                yield self._converted, True
            else:
                yield stored, release is not None
        finally:
            if release is not None:
                release(name)

    def _run_block(self, name: str, forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        if torch.compiler.is_compiling():
            raise RuntimeError(f"{name} is streamed, which cannot be compiled from outside; compile its blocks instead")
        if torch.is_grad_enabled() and any(_requires_grad(value) for value in pytree.tree_leaves((args, kwargs))):
            raise RuntimeError(
                f"{name} is offloaded before its gradient is computed; run it under torch.no_grad(), or do not wrap a "
                "module that gradients pass through"
            )
        with self._bound(name) as shared:
            output = forward(*args, **kwargs)
            # A block may return a weight, or a view of one; its memory is about to be overwritten by another block.
            output = pytree.tree_map(lambda value: value.clone() if _is_in(value, shared) else value, output)
        if self.swap is not None:
            self.swap.block_called(self, name)
        return output

    def _enter_and_run(self, forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        self.enter()
        return forward(*args, **kwargs)

    def _bind(self, name: str, parameters: Mapping[str, nn.Parameter]) -> None:
        for part, key, full in self._locations[name]:
            part._parameters[key] = parameters[full]

    def _unbind(self, name: str) -> None:
        self._bind(name, self._offloaded[name])
        self._running = None

    def _own_tensors(self, name: str) -> dict[str, Tensor]:
        """Return a dict full name -> parameter of block `name`, as the module has them now."""
        found = {full: part._parameters[key] for part, key, full in self._locations[name]}
        return {full: tensor for full, tensor in found.items() if tensor is not None}

    def _packing(self, name: str, high_precision: Sequence[str]) -> Packing:
        tensors = self._own_tensors(name)
        return Packing(tensors, {full: self._dtypes(full, tensor, high_precision) for full, tensor in tensors.items()})

    def _dtypes(self, name: str, tensor: Tensor, high_precision: Sequence[str]) -> tuple[torch.dtype, torch.dtype]:
        """Return a pair (stored dtype, computed dtype) for parameter `name`: the policy's, or twice its own if it is
        not floating-point; where a pattern in `high_precision` fits, 8-bit storage gives way to the narrower of own and
        computed dtype.
        """
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
        for name, packing in self._packings.items():
            memory = pool.take(packing.stored_bytes)
            weights[name] = HostWeights.copy(packing, self._own_tensors(name), memory)
            # Bound now, so that only one block at a time is in memory twice.
            self._bind(name, frozen_parameters(packing.stored_views(memory)))
        return weights

    def _read_all(self, weights: Mapping[str, BlockWeights]) -> dict[str, BlockWeights]:
        pool = self._pool()
        return {name: HostWeights.read(each, pool.take(each.packing.stored_bytes)) for name, each in weights.items()}

    def _pool(self) -> PinnedPool:
        """Return a new `PinnedPool` for all weights; it pins if they take less than half of the free host memory or
        that is unknown, but never for the CPU.
        """
        sizes = [packing.stored_bytes for packing in self._packings.values()]
        free = devices.available_memory("cpu")
        return PinnedPool(sizes, self.policy.device, pin=free is None or 2 * sum(sizes) < free)

    def _offloaded_parameters(self, name: str) -> dict[str, nn.Parameter]:
        """Return a dict full name -> parameter that the module has while block `name` does not run: on the CPU, or on
        meta if the weights are on disk.
        """
        packing, memory = self._packings[name], self._block_weights[name].memory
        if memory is not None:
            return frozen_parameters(packing.stored_views(memory))
        return unloaded_parameters(_on_meta(packing))


def _on_meta(packing: Packing) -> dict[str, Tensor]:
    return packing.computed_views(torch.empty(packing.computed_bytes, dtype=torch.uint8, device="meta"))


def _requires_grad(value: Any) -> bool:
    return isinstance(value, Tensor) and value.requires_grad


def _is_in(value: Any, memory: int | None) -> bool:
    return isinstance(value, Tensor) and memory is not None and value.untyped_storage().data_ptr() == memory
