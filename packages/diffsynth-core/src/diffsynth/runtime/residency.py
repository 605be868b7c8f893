"""Which components are on the device while a stage runs.

Whole components only: without a limit everything stays on the device; with one, each component waits in host memory
and is on the device only for the stages that use it. Block-wise streaming belongs to the VRAM engine.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch

from diffsynth.errors import NotEnoughMemory

logger = logging.getLogger(__name__)
GIB = 2**30


class Residency:
    """Moves the modules of a pipeline between host memory and its device.

    Args:
        components: role -> module or processor; processors never move.
        device: where computation happens.
        vram_limit: GiB that resident weights may take, or None for no limit. Activations come on top.

    Raises:
        NotEnoughMemory: a single component is larger than the limit.
    """

    def __init__(self, components: Mapping[str, Any], device: torch.device, vram_limit: float | None) -> None:
        self._modules = {role: part for role, part in components.items() if isinstance(part, torch.nn.Module)}
        self._device = device
        self._turn = threading.RLock()
        self.offloads = vram_limit is not None and device.type != "cpu"
        if vram_limit is None:
            return
        if device.type == "cpu":
            logger.warning("vram_limit=%s has no effect: the pipeline runs on the CPU", vram_limit)
            return
        self._check(vram_limit)
        for module in self._modules.values():
            module.to("cpu")

    @contextmanager
    def on_device(self, roles: Collection[str]) -> Iterator[None]:
        """Have these roles on the device inside the `with`; under a limit, threads take turns."""
        if not self.offloads:
            yield
            return
        used = [self._modules[role] for role in roles if role in self._modules]
        # Two stages at once would take each other's components away, or fill the device past its limit.
        with self._turn:
            for module in used:
                module.to(self._device)
            try:
                yield
            finally:
                for module in used:
                    module.to("cpu")

    def _check(self, vram_limit: float) -> None:
        sizes = {role: _bytes(module) / GIB for role, module in self._modules.items()}
        role = max(sizes, key=lambda name: sizes[name], default="")
        if role and sizes[role] > vram_limit:
            raise NotEnoughMemory(
                f"vram_limit={vram_limit} GiB: {role} alone takes {sizes[role]:.2f} GiB; the smallest limit that "
                f"works for this pipeline is {sizes[role]:.2f}"
            )


def _bytes(module: torch.nn.Module) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in (*module.parameters(), *module.buffers()))
