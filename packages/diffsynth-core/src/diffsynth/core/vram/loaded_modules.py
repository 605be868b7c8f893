"""The wrapped modules that a device holds: stages run one at a time, and modules that are in the way are offloaded."""

from __future__ import annotations

import functools
import threading
import weakref
from collections import deque
from collections.abc import Collection, Iterator
from contextlib import contextmanager

import torch

from diffsynth.core.vram.managed import ManagedModule


class LoadedModules:
    """The wrapped modules on one device, of all pipelines.

    Two stages at once would offload each other's components, or fill the device past its limit, so only one thread at
    a time runs a stage.
    """

    def __init__(self) -> None:
        self._lock = threading.RLock()
        self._depth = 0
        self._stages = 0
        self._present: weakref.WeakSet[ManagedModule] = weakref.WeakSet()
        self._released: weakref.WeakSet[ManagedModule] = weakref.WeakSet()
        self._releasing = threading.Lock()

    @contextmanager
    def lock(self) -> Iterator[None]:
        """Context manager that holds the device's lock: no other thread runs a stage (a part of a call) there
        meanwhile.
        """
        try:
            with self._lock:
                self._depth += 1
                try:
                    yield
                finally:
                    self._depth -= 1
        finally:
            self._offload_released()

    def release(self, modules: Collection[ManagedModule]) -> None:
        """Offload modules that a call no longer uses: now, or after the stage of another thread that runs meanwhile,
        which may use them, too. The caller does not wait for it.
        """
        with self._releasing:
            self._released.update(modules)
        self._offload_released()

    def _offload_released(self) -> None:
        # A thread that does not get the lock leaves the rest to the thread that holds it, which comes here afterwards.
        while self._released and self._lock.acquire(blocking=False):
            try:
                if self._depth:
                    return  # a call inside of a stage of this thread, such as one that `on_step` makes
                with self._releasing:
                    modules, self._released = list(self._released), weakref.WeakSet()
                for module in modules:
                    module.leave()
                    self._present.discard(module)
            finally:
                self._lock.release()

    @contextmanager
    def stage(self, used: Collection[ManagedModule], *, keep: Collection[ManagedModule] = ()) -> Iterator[None]:
        """Context manager that holds the device's lock, first offloads all other wrapped modules that are on the device
        except those in `keep`, then loads the modules in `used`; after an error it offloads these.

        The modules stay afterwards, until another stage needs the memory; after an error they are offloaded. A stage
        inside of a stage of the same thread, such as one that `on_step` makes, offloads its own at its end, so that
        those of the stage around it are loaded again when they run and are alone on the device.

        Args:
            used: modules that the stage runs.
            keep: modules that may be on the device meanwhile; all others are offloaded first.
        """
        with self.lock():
            around = set(self._present) if self._stages else set()
            self._stages += 1
            self.offload_all(keep=(*used, *keep))
            try:
                for module in used:
                    self._present.add(module)
                    module.enter()
                yield
            except BaseException:
                for module in used:
                    module.leave()
                raise
            finally:
                self._stages -= 1
                for module in [*self._present] if self._stages else ():
                    if module not in around:
                        module.leave()
                # Those that were offloaded load themselves when they run, and later stages must know of them.
                self._present.update(around)

    @contextmanager
    def overlapped_swap(
        self, outgoing: Collection[ManagedModule], incoming: Collection[ManagedModule], *, free_bytes: int = 0
    ) -> Iterator[None]:
        """Context manager for the last step of a stage: each block of `outgoing` is evicted after its last call, and
        blocks of `incoming` are copied to the device in its place.

        See `OverlappedSwap`. If no incoming block can be prefetched, it only locks out stages of other threads.

        Args:
            outgoing: modules of the stage that the next one does not use.
            incoming: modules of the next stage that this one does not use, configured for it.
            free_bytes: bytes that the incoming modules may take beside those that outgoing blocks free.
        """
        with self.lock():
            if not any(module.prefetchable() for module in incoming):
                yield
                return
            self._present.update(incoming)
            swap = OverlappedSwap(outgoing, incoming, free_bytes=free_bytes)
            try:
                yield
            finally:
                swap.close()

    def offload_all(self, *, keep: Collection[ManagedModule] = ()) -> None:
        """Free the device memory of all wrapped modules that `stage` or `overlapped_swap` brought to the device, except
        those in `keep`.
        """
        with self.lock():
            for module in list(self._present):
                if module not in keep:
                    module.leave()
                    self._present.discard(module)


class OverlappedSwap:
    """Swaps modules on a device block by block, while the last step of the outgoing ones runs.

    A block that has run for the last time is evicted, and the next block of the incoming modules is copied to the
    freed memory. So all together they never take more than the outgoing modules and `free_bytes`. Which call of a
    block is the last is predicted from the step before; without one only `free_bytes` is filled. If a block is called
    once more after all, it is loaded again: that costs time, and never gives wrong weights.

    Args:
        outgoing: modules of the stage that the next one does not use.
        incoming: modules of the next stage that this one does not use, configured for it.
        free_bytes: bytes that the incoming modules may take beside those that outgoing blocks free.
    """

    def __init__(
        self, outgoing: Collection[ManagedModule], incoming: Collection[ManagedModule], *, free_bytes: int
    ) -> None:
        self._outgoing, self._incoming = tuple(outgoing), tuple(incoming)
        self._free_bytes = free_bytes
        self._calls_left = {
            (module, name): module.expected_calls(name) for module in self._outgoing for name in module.blocks
        }
        self._to_prefetch = deque((module, *block) for module in self._incoming for block in module.prefetchable())
        for module in self._outgoing:
            module.swap = self
        self._prefetch()

    def block_called(self, module: ManagedModule, name: str) -> None:
        """Count a call of block `name` of `module`, an outgoing one; after its last expected call, free the block on
        the device and begin to copy incoming blocks.
        """
        self._calls_left[module, name] -= 1
        if self._calls_left[module, name] == 0:
            self._free_bytes += module.evict(name)
            self._prefetch()

    def evicted_too_early(self) -> None:
        """Offload all incoming modules and begin no more copies of their blocks, because an evicted block is called
        again.
        """
        self._to_prefetch.clear()
        for module in self._incoming:
            module.leave()

    def close(self) -> None:
        """End the swap: calls of the outgoing modules' blocks are no longer counted."""
        for module in self._outgoing:
            module.swap = None

    def _prefetch(self) -> None:
        while self._to_prefetch and self._to_prefetch[0][2] <= self._free_bytes:
            module, name, size = self._to_prefetch.popleft()
            module.prefetch(name)
            self._free_bytes -= size


@functools.cache
def loaded_modules(device: torch.device) -> LoadedModules:
    """Return the `LoadedModules` of `device`, the same object at each call; an accelerator needs an index: `cuda:0`, as
    `cuda` would get an object of its own.
    """
    return LoadedModules()
