"""The state of torch that code of this package relies on, whatever a program has set for its own."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import torch

_lock = threading.Lock()
_inside = 0
_dtype_before = torch.float32


@contextmanager
def torch_defaults() -> Iterator[None]:
    """Context manager, or decorator, in which torch makes tensors on the CPU in fp32 unless told otherwise, and normal
    tensors: not those of inference mode, which other threads and later calls cannot write to.

    `torch.set_default_device` and `torch.inference_mode` hold for one thread, `torch.set_default_dtype` for all: other
    threads see fp32, too, until the last of all these contexts ends.
    """
    with ExitStack() as stack:
        _enter()
        stack.callback(_leave)
        if torch.is_inference_mode_enabled():
            stack.enter_context(torch.inference_mode(False))
            stack.enter_context(torch.no_grad())
        if torch.get_default_device().type != "cpu":
            stack.enter_context(torch.device("cpu"))
        yield


def _enter() -> None:
    global _inside, _dtype_before
    with _lock:
        if _inside == 0:
            _dtype_before = torch.get_default_dtype()
            if _dtype_before != torch.float32:
                torch.set_default_dtype(torch.float32)
        _inside += 1


def _leave() -> None:
    global _inside
    with _lock:
        _inside -= 1
        if _inside == 0 and _dtype_before != torch.float32:
            torch.set_default_dtype(_dtype_before)
