"""Who is on a device: stages take turns, and what is in the way leaves."""

from __future__ import annotations

import functools
import threading
import weakref
from collections.abc import Collection, Iterator
from contextlib import contextmanager

import torch

from diffsynth.core.vram.managed import ManagedModule


class Occupants:
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

    def clear(self, *, but: Collection[ManagedModule] = ()) -> None:
        """Have all but some leave the device."""
        with self._turn:
            for module in list(self._present):
                if module not in but:
                    module.leave()
                    self._present.discard(module)


@functools.cache
def occupants(device: torch.device) -> Occupants:
    """The one of a device, `cuda:0` rather than `cuda`."""
    return Occupants()
