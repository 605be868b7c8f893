"""For every test: no network, fixed seeds, none of the caller's settings, and `torch.empty` that is really unfilled."""

from __future__ import annotations

import ipaddress
import os
import random
import socket
import sys

import pytest
from hypothesis import settings

# The same examples in every run: a red test is a change's fault, not the dice's.
settings.register_profile("repeatable", derandomize=True)
settings.load_profile("repeatable")

_ALLOCATORS = ("empty", "empty_like", "empty_strided")
_OURS = ("diffsynth", "diffsynth_")

for _name in [name for name in os.environ if name.startswith("DIFFSYNTH_")]:
    del os.environ[_name]  # some tests look at the registry when they are collected

# Our kernels run on the CPU. Triton reads this once, when it is imported, and every module with kernels imports it.
os.environ["TRITON_INTERPRET"] = "1"


class NetworkForbidden(RuntimeError):
    """A test reached for the network."""


@pytest.fixture(autouse=True)
def _fixed_seeds():
    random.seed(0)
    if numpy := sys.modules.get("numpy"):
        numpy.random.seed(0)
    if torch := sys.modules.get("torch"):
        torch.manual_seed(0)


@pytest.fixture(autouse=True)
def _own_settings(monkeypatch, tmp_path_factory):
    monkeypatch.setenv("DIFFSYNTH_CACHE_DIR", str(tmp_path_factory.getbasetemp() / "cache"))


@pytest.fixture(autouse=True)
def _no_network(monkeypatch, request):
    if "packaging" in request.path.parts:
        return
    for name in ("connect", "connect_ex"):
        monkeypatch.setattr(socket.socket, name, _guarded(getattr(socket.socket, name)))


@pytest.fixture(autouse=True)
def _unfilled_memory(monkeypatch):
    """Memory that library code allocates and forgets to fill is NaN, not the zeros of a fresh page."""
    if (torch := sys.modules.get("torch")) is None or not hasattr(torch, "empty"):
        return
    with torch.device("meta"):
        torch.empty(0)  # torch remembers which functions it gives a device to; it must not remember ours
    # `with torch.device("meta")` remembers the allocators it first saw: it must see torch's own, or a 4B model is real.
    from torch.utils._device import _device_constructors

    _device_constructors()
    for name in _ALLOCATORS:
        monkeypatch.setattr(torch, name, _filled_with_nan(getattr(torch, name)))
    monkeypatch.setattr(torch.Tensor, "new_empty", _filled_with_nan(torch.Tensor.new_empty))


def _guarded(connect):
    def guarded(self, address, *rest):
        if self.family != getattr(socket, "AF_UNIX", None) and not _is_loopback(address[0]):
            raise NetworkForbidden(f"a test wants to reach {address!r}; only loopback is allowed")
        return connect(self, address, *rest)

    return guarded


def _is_loopback(host):
    try:
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def _filled_with_nan(allocate):
    def allocate_and_fill(*args, **kwargs):
        tensor = allocate(*args, **kwargs)
        caller = sys._getframe(1).f_globals.get("__name__", "")
        if caller.split(".")[0].startswith(_OURS) and tensor.is_floating_point():
            tensor.fill_(float("nan"))
        return tensor

    return allocate_and_fill
