"""Whether tensors are finite: hold no NaN and no infinity. Checks of weights when they are read, and of steps."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from diffsynth.core.device.backends import backend_and_module
from diffsynth.core.device.streams import record_event

SAMPLED_FROM = 2**20
"""Bytes of a tensor in host memory from which `nonfinite` looks at samples of it instead of the whole."""

_PERIOD, _SAMPLE = 2**19, 2**12
"""Bytes between the starts of two samples, and bytes of each."""

_AT_ONCE = 2**21
"""Bytes that are looked at together."""


def is_finite(*tensors: Tensor) -> Tensor:
    """Return a bool scalar tensor on the device of the tensors: whether all of them hold finite numbers alone; nothing
    waits for the device.

    Numbers that are not floating are finite. Without tensors the result is True, on the CPU.
    """
    flags = [_all_finite(tensor.detach()) for tensor in tensors if tensor.is_floating_point() and tensor.numel()]
    if not flags:
        return torch.ones((), dtype=torch.bool, device=tensors[0].device if tensors else None)
    return flags[0] if len(flags) == 1 else torch.stack(flags).all()


def nonfinite(tensors: Mapping[str, Tensor], *, whole: bool = False) -> list[str]:
    """Return a list of the names of those tensors that hold NaN or infinity, in the given order; meta tensors are left
    out.

    Of a tensor of 1 MiB or more in host memory 4 KiB of every 512 KiB are looked at: reading all of it would take as
    long as loading it does. On a device all of it is looked at, and the host waits once.

    Args:
        tensors: name -> tensor.
        whole: whether large tensors in host memory are looked at as a whole, too.
    """
    groups: dict[tuple[torch.device, torch.dtype], list[str]] = {}
    for name, tensor in tensors.items():
        if not tensor.is_meta and tensor.is_floating_point() and tensor.numel():
            groups.setdefault((tensor.device, tensor.dtype), []).append(name)
    wrong: set[str] = set()
    for (device, _), names in groups.items():
        samples = device.type == "cpu" and not whole
        looked_at = {name: _sample(tensors[name].detach()) if samples else tensors[name].detach() for name in names}
        for part in _portions(looked_at):
            # One look at many samples: a call for each would take as long as reading them.
            if samples and is_finite(torch.cat([looked_at[name].reshape(-1) for name in part])):
                continue
            flags = torch.stack([is_finite(looked_at[name]) for name in part]).tolist()
            wrong.update(name for name, fine in zip(part, flags, strict=True) if not fine)
    return [name for name in tensors if name in wrong]


class LateCheck:
    """A check whether the tensors of each step are finite. A device's answer is read one step late: by then the step is
    done or the next one is queued behind it, so neither the host nor the device waits for the other.

    On the CPU the answer is there at once. On a device without events (MPS) all answers are read at the end. On meta
    there is nothing to check.

    Args:
        device: the device that the tensors are on.
    """

    def __init__(self, device: torch.device | str) -> None:
        self._device = torch.device(device)
        self._has_events = False
        if self._device.type != "meta":
            backend, module = backend_and_module(self._device)
            self._has_events = backend.streams and module is not None
        self._pending: list[tuple[int, Tensor, Any]] = []

    def add(self, step: int, *tensors: Tensor) -> int | None:
        """Note the tensors of a step, and return the number of a step found not to be finite (this one on the CPU, the
        one before on a device); None if there is none.
        """
        if self._device.type == "meta":
            return None
        late = self._read() if self._has_events else None
        flag = is_finite(*tensors)
        if self._device.type == "cpu":
            return None if bool(flag) else step
        if self._has_events:
            host = torch.empty((), dtype=torch.bool, pin_memory=True)
            host.copy_(flag, non_blocking=True)
            self._pending.append((step, host, record_event(self._device)))
        else:
            self._pending.append((step, flag, None))
        return late

    def finish(self) -> int | None:
        """Wait for the steps noted last, and return the number of the first one that is not finite; None if all are."""
        return self._read()

    def _read(self) -> int | None:
        pending, self._pending = self._pending, []
        for step, flag, event in pending:
            if event is not None:
                event.synchronize()
            if not bool(flag):
                return step
        return None


def _all_finite(tensor: Tensor) -> Tensor:
    if tensor.dtype.itemsize < 2:
        tensor = tensor.to(torch.bfloat16)
    if tensor.is_complex():
        tensor = torch.view_as_real(tensor)
    # NaN passes through both, and no tensor of bools is made. MPS and NPU lack the fused one.
    low, high = torch.aminmax(tensor) if tensor.device.type == "cpu" else (tensor.amin(), tensor.amax())
    return torch.isfinite(low) & torch.isfinite(high)


def _portions(tensors: Mapping[str, Tensor]) -> Iterator[list[str]]:
    """Yield lists of the names of consecutive tensors of at most 2 MiB together, or of one larger tensor."""
    part: list[str] = []
    size = 0
    for name, tensor in tensors.items():
        if part and size + tensor.nbytes > _AT_ONCE:
            yield part
            part, size = [], 0
        part.append(name)
        size += tensor.nbytes
    if part:
        yield part


def _sample(tensor: Tensor) -> Tensor:
    size = tensor.dtype.itemsize
    if tensor.numel() * size < SAMPLED_FROM or not tensor.is_contiguous():
        return tensor
    period = _PERIOD // size
    rows = tensor.detach().view(-1)[: tensor.numel() // period * period].view(-1, period)
    return rows[:, : _SAMPLE // size]
