"""Tests of this folder need an accelerator, and Triton that compiles: run them in a process of their own.

    pytest tests/gpu

Elsewhere the folder is left out, and one line at the end of the run says why.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent
_REASON = pytest.StashKey[str | None]()


def pytest_configure(config):
    alone = all(_path(config, argument).is_relative_to(HERE) for argument in config.args)
    if alone and "triton" not in sys.modules:
        # tests/conftest.py has the kernels interpreted; here they are compiled. Triton asks once, when it is imported.
        os.environ.pop("TRITON_INTERPRET", None)
    config.stash[_REASON] = _why_not(alone)


def pytest_ignore_collect(collection_path, config):
    if config.stash[_REASON] is not None and collection_path.is_relative_to(HERE) and collection_path != HERE:
        return True
    return None


def pytest_terminal_summary(terminalreporter, config):
    if (reason := config.stash[_REASON]) is not None:
        terminalreporter.write_line(f"tests/gpu was left out: {reason}")


@pytest.fixture
def device():
    """The accelerator, with its peak memory reset."""
    import torch

    from diffsynth.core import device as devices

    found = devices.default_device()
    devices.synchronize(found)
    devices.empty_cache(found)
    devices.reset_peak_memory(found)
    torch.manual_seed(0)
    return found


@pytest.fixture
def on_the_device(device):
    """Tensors without an explicit device are created on the accelerator."""
    import torch

    before = torch.get_default_device()
    torch.set_default_device(device)
    yield device
    torch.set_default_device(before)


def _path(config, argument: str) -> Path:
    return (config.invocation_params.dir / argument.split("::")[0]).resolve()


def _why_not(alone: bool) -> str | None:
    from diffsynth.core import device as devices

    if not devices.IS_CUDA_AVAILABLE:
        return "no CUDA device here"
    if not alone:
        return "kernels are interpreted in this process; run: pytest tests/gpu"
    return None
