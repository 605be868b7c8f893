"""Memory of a call that is traced on the meta device: live storages, their peak, and workspaces of kernels."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

ROUNDING = 512
"""Bytes to which torch's allocators for accelerators round up; on the CPU so few bytes make no difference."""

_aten = torch.ops.aten


class AllocationTracker:
    """Counts live bytes on the device and on the host, and their peak.

    It counts storages, not tensors: views of one storage count once, and it counts until the last of them is gone.
    Storages on the meta device belong to the device unless the caller says otherwise, all others to the host.
    """

    def __init__(self) -> None:
        self.live = {"device": 0, "host": 0}
        self.peak = dict(self.live)
        self._known: dict[int, weakref.ref[object]] = {}

    def ignore(self, tensors: Iterable[Tensor]) -> None:
        """Exclude the memory of `tensors` from all counts: weights, which are counted elsewhere."""
        for tensor in tensors:
            self._add(tensor, "device", 0)

    def allocated(self, tensor: Tensor, *, on_host: bool = False) -> None:
        """Count the bytes of `tensor`'s storage, rounded up to a multiple of 512, as live on the device or on the host
        until it is freed; do nothing if it is counted already.

        Args:
            tensor: result of an operation.
            on_host: the tensor is on meta but represents one in host memory.
        """
        size = tensor.untyped_storage().nbytes()
        memory = "device" if tensor.is_meta and not on_host else "host"
        self._add(tensor, memory, -(-size // ROUNDING) * ROUNDING)

    def workspace(self, size: int) -> None:
        """Raise the device's peak, if it is lower, to the live bytes plus `size` bytes, which an operation takes only
        while it runs.
        """
        self.peak["device"] = max(self.peak["device"], self.live["device"] + size)

    def reset_peak(self) -> None:
        """Set the peaks on the device and on the host to the bytes that are live now."""
        self.peak = dict(self.live)

    @contextmanager
    def peak_above(self) -> Iterator[Mapping[str, int]]:
        """Context manager that yields a dict "device" and "host" -> bytes, filled in at the end: the peak inside less
        what was live at the beginning.

        Yields:
            Bytes by memory ("device", "host"), filled in at the end.
        """
        before, peak, above = dict(self.live), self.peak, {"device": 0, "host": 0}
        self.reset_peak()
        try:
            yield above
        finally:
            for memory, size in before.items():
                above[memory] = self.peak[memory] - size
                self.peak[memory] = max(self.peak[memory], peak[memory])

    def repeat(self, above: Mapping[str, int]) -> None:
        """Raise each peak (device, host), if it is lower, to the live bytes plus its value in `above`, a mapping from
        `peak_above`.
        """
        for memory, size in above.items():
            self.peak[memory] = max(self.peak[memory], self.live[memory] + size)

    def _add(self, tensor: Tensor, memory: str, size: int) -> None:
        storage = tensor.untyped_storage()
        key = id(storage)
        if key in self._known:
            return

        def freed(_: object) -> None:
            del self._known[key]
            self.live[memory] -= size

        # torch keeps the Python object of a storage as long as the storage itself.
        self._known[key] = weakref.ref(storage, freed)
        self.live[memory] += size
        self.peak[memory] = max(self.peak[memory], self.live[memory])


def kernel_workspace(func: Any, args: Sequence[Any], out: Any, device_type: str) -> int:
    """Return the scratch memory that a kernel takes beside its inputs and outputs, in bytes, an int; 0 if no rule is
    known for the operation.

    Args:
        func: the operation, of `torch.ops.aten`.
        args: its positional arguments.
        out: its result.
        device_type: type of the device that the call is planned for, "cpu" or "cuda".
    """
    rule = _WORKSPACES.get((func.overloadpacket, device_type))
    return 0 if rule is None else rule(args, out)


def _convolution_on_cpu(args: Sequence[Any], out: Tensor) -> int:
    # As measured: oneDNN copies a contiguous input into its blocked layout, computes a blocked output, frees the first
    # and copies the second. Kernels of one pixel and channels-last tensors need neither. Where oneDNN has no kernel
    # for the dtype, torch unfolds the input.
    x, weight = args[0], args[1]
    kernel = weight[0, 0].numel()
    if kernel == 1 or _is_channels_last(x):
        return 0
    if x.dtype == torch.float32 or (x.dtype == torch.bfloat16 and torch.ops.mkldnn._is_mkldnn_bf16_supported()):
        blocked_in, blocked_out = _blocked_bytes(x), _blocked_bytes(out)
        return max(blocked_in + blocked_out - out.nbytes, blocked_out) + int(weight.nbytes)
    return int(x.shape[0] * x.shape[1] * kernel * out[0, 0].numel() * x.element_size())


def _blocked_bytes(x: Tensor) -> int:
    return -(-x.shape[1] // _LANES) * _LANES * x[:, 0].numel() * x.element_size()


def _is_channels_last(x: Tensor) -> bool:
    formats = {4: torch.channels_last, 5: torch.channels_last_3d}
    return x.ndim in formats and not x.is_contiguous() and x.is_contiguous(memory_format=formats[x.ndim])


_LANES = 8
"""Channels in a block of oneDNN's layout: 8 with AVX2; 16 with AVX-512, which differs for very few channels only."""

_WORKSPACES: dict[tuple[Any, str], Callable[[Sequence[Any], Any], int]] = {
    (_aten.convolution, "cpu"): _convolution_on_cpu,
}
"""(operation, device type) -> function of its arguments and its result that returns its workspace in bytes."""
