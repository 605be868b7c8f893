"""Fixtures and settings for every test: no network, fixed seeds, default settings, NaN in uninitialised memory.

Tests run in several processes (pytest-xdist, `--dist loadfile`): those of one file in one process, in order, so that a
fixture of module scope is made once. Slow files are run first: one that is run last leaves the other processes idle.
"""

from __future__ import annotations

import ipaddress
import os
import random
import socket
import sys
from pathlib import Path

import pytest
from hypothesis import settings

# The same examples in every run, so that a failure is caused by a change and not by chance.
settings.register_profile("repeatable", derandomize=True)
settings.load_profile("repeatable")

_ALLOCATORS = ("empty", "empty_like", "empty_strided")
_OUR_PACKAGES = ("diffsynth", "diffsynth_")
_MOST_WORKERS = 8

SLOW_FILES = (
    "rows/test_qwen_image.py",
    "packaging/test_wheels.py",
    "rows/test_wan.py",
    "rows/test_z_image.py",
    "contracts/test_conformance.py",
    "docs/test_host_apps.py",
    "docs/test_blocks.py",
    "contracts/test_prose.py",
    "testing/test_hub.py",
    "runtime/test_auto_policy.py",
    "qwen_image/test_plan.py",
    "benchmarks/test_image_calls.py",
    "benchmarks/test_kernels.py",
    "zimage/test_nano.py",
    "zimage/features/test_controlnet.py",
    "wan/test_flat_calls.py",
    "wan/test_variants_parity.py",
)
"""Files below this folder that take 15 s or more, the slowest first."""

for _name in [name for name in os.environ if name.startswith("DIFFSYNTH_")]:
    del os.environ[_name]  # some tests read the registry while they are collected

# Our kernels run on the CPU. Triton reads this once, when it is imported, and every module with kernels imports it.
os.environ["TRITON_INTERPRET"] = "1"

# Workers and the processes that tests start share the cores. Torch reads this once, when its thread pool is made.
os.environ.setdefault("OMP_NUM_THREADS", "1")

# Containers often set PYTHONDONTWRITEBYTECODE. Each process would then compile torch anew, which takes 10 s, and the
# tests start dozens: bytecode is written all the same, but into the environment instead of beside the sources.
if sys.dont_write_bytecode:
    sys.dont_write_bytecode, sys.pycache_prefix = False, str(Path(sys.prefix) / "bytecode")
    os.environ.pop("PYTHONDONTWRITEBYTECODE", None)
    os.environ["PYTHONPYCACHEPREFIX"] = sys.pycache_prefix


def pytest_collection_modifyitems(items) -> None:
    """Put the tests of `SLOW_FILES` first, in that order; others keep theirs. Workers take files in this order, because
    pyproject.toml has `--no-loadscope-reorder`, without which the files with the fewest tests are run last.
    """
    folder = Path(__file__).parent
    order = {folder / name: index for index, name in enumerate(SLOW_FILES)}
    items.sort(key=lambda item: order.get(item.path, len(order)))


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_auto_num_workers(config) -> int | None:
    """Return the number of workers for `-n auto`: one for each core, at most 8; none for tests/gpu.

    A worker takes up to 2 GiB of memory. Tests of tests/gpu measure the memory and time of one device, so they run
    one after the other.
    """
    if os.environ.get("PYTEST_XDIST_AUTO_NUM_WORKERS"):
        return None  # pytest-xdist reads it
    gpu = Path(__file__).parent / "gpu"
    if all((config.invocation_params.dir / name.split("::")[0]).resolve().is_relative_to(gpu) for name in config.args):
        return 0
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return min(cores, _MOST_WORKERS)


class NetworkForbidden(RuntimeError):
    """A test opened a connection to another machine."""


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
    if discovery := sys.modules.get("diffsynth._discovery"):
        monkeypatch.setattr(discovery, "SLOW", 60.0)  # on a busy machine every plugin may take seconds


@pytest.fixture(autouse=True)
def _no_network(monkeypatch, request):
    if "packaging" in request.path.parts:
        return
    for name in ("connect", "connect_ex"):
        monkeypatch.setattr(socket.socket, name, _guarded(getattr(socket.socket, name)))


@pytest.fixture(autouse=True)
def _unfilled_memory(monkeypatch):
    """Fill memory that library code allocates with `torch.empty` with NaN; a new page would often be zeros."""
    if (torch := sys.modules.get("torch")) is None or not hasattr(torch, "empty"):
        return
    with torch.device("meta"):
        torch.empty(0)  # torch caches the allocators that take a device; it must not cache our replacements
    # `with torch.device("meta")` caches the allocators on first use. If it cached ours, meta tensors would be real.
    from torch.utils._device import _device_constructors

    _device_constructors()
    for name in _ALLOCATORS:
        monkeypatch.setattr(torch, name, _filled_with_nan(getattr(torch, name)))
    monkeypatch.setattr(torch.Tensor, "new_empty", _filled_with_nan(torch.Tensor.new_empty))


def _guarded(connect):
    def guarded(self, address, *rest):
        if self.family != getattr(socket, "AF_UNIX", None) and not _is_loopback(address[0]):
            raise NetworkForbidden(f"a test connects to {address!r}; only loopback is allowed")
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
        if caller.split(".")[0].startswith(_OUR_PACKAGES) and tensor.is_floating_point():
            tensor.fill_(float("nan"))
        return tensor

    return allocate_and_fill
