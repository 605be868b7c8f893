"""The kernels run on the CPU, in Triton's interpreter: the suite's `tests/conftest.py` sets TRITON_INTERPRET=1."""

import pytest
import triton

from diffsynth.core.attention.triton.forward import flash_fwd_kernel


@pytest.fixture(autouse=True, scope="session")
def _interpreted():
    if isinstance(flash_fwd_kernel, triton.JITFunction):
        pytest.fail("Triton was imported before TRITON_INTERPRET=1 was set; it reads that once, when kernels are made")
