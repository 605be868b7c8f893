"""Who is on a device: stages take turns, and what is in the way leaves."""

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
    """The wrapped modules of one device, whichever pipelines they are of.

    Two stages at once would take each other's components away, or fill the device past its limit; so threads take
    turns.
    """

    def __init__(self) -> None:
        self._turn = threading.RLock()
        self._present: weakref.WeakSet[ManagedModule] = weakref.WeakSet()

    @contextmanager
    def turn(self) -> Iterator[None]:
        """Nobody else's stage runs inside the `with`."""
        with self._turn:
            yield

    @contextmanager
    def stage(self, used: Collection[ManagedModule], *, beside: Collection[ManagedModule] = ()) -> Iterator[None]:
        """Have these modules on the device inside the `with`. They stay afterwards, until another stage wants the room.

        Args:
            used: what the stage runs.
            beside: what may be on the device meanwhile; everything else leaves first.
        """
        with self._turn:
            self.clear(but=(*used, *beside))
            try:
                for module in used:
                    self._present.add(module)
                    module.enter()
                yield
            except BaseException:
                for module in used:
                    module.leave()
                raise

    @contextmanager
    def overlapped_swap(
        self, leaving: Collection[ManagedModule], coming: Collection[ManagedModule], *, room: int = 0
    ) -> Iterator[None]:
        """Run the last step of a stage inside the `with`; see `OverlappedSwap`.

        Args:
            leaving: modules of the stage that the next one does not use.
            coming: those that it uses and this does not, configured for it.
            room: bytes that they may take beside what leaves.
        """
        with self._turn:
            if not any(module.to_send() for module in coming):
                yield
                return
            self._present.update(coming)
            swap = OverlappedSwap(leaving, coming, room=room)
            try:
                yield
            finally:
                swap.close()

    def clear(self, *, but: Collection[ManagedModule] = ()) -> None:
        """Have all but some leave the device."""
        with self._turn:
            for module in list(self._present):
                if module not in but:
                    module.leave()
                    self._present.discard(module)


class OverlappedSwap:
    """A device goes from some modules to others, block by block, while the last step of the first runs.

    A block that has run for the last time leaves, and in its place the next one of the others sets out, so all together
    they never take more than the first took, and `room`. Which run is the last is learnt from the step before; without
    one, `room` is all there is. A block that is asked for once more after all takes its place back: that costs time,
    never a wrong weight.

    Args:
        leaving, coming, room: as of `LoadedModules.hand_over`.
    """

    def __init__(self, leaving: Collection[ManagedModule], coming: Collection[ManagedModule], *, room: int) -> None:
        self._leaving, self._coming = tuple(leaving), tuple(coming)
        self._room = room
        self._runs_left = {
            (module, name): module.expected_runs(name) for module in self._leaving for name in module.blocks
        }
        self._waiting = deque((module, *block) for module in self._coming for block in module.to_send())
        for module in self._leaving:
            module.swap = self
        self._send()

    def ran(self, module: ManagedModule, name: str) -> None:
        """A block of those that leave has run."""
        self._runs_left[module, name] -= 1
        if self._runs_left[module, name] == 0:
            self._room += module.let_go(name)
            self._send()

    def withdraw(self) -> None:
        """A block that was let go is asked for: those that came in its place make room, and no other sets out."""
        self._waiting.clear()
        for module in self._coming:
            module.leave()

    def close(self) -> None:
        """The step is over."""
        for module in self._leaving:
            module.swap = None

    def _send(self) -> None:
        while self._waiting and self._waiting[0][2] <= self._room:
            module, name, size = self._waiting.popleft()
            module.send(name)
            self._room -= size


@functools.cache
def loaded_modules(device: torch.device) -> LoadedModules:
    """The one of a device, `cuda:0` rather than `cuda`."""
    return LoadedModules()
