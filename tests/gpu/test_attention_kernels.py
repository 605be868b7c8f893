"""The cases of the CPU's tests of attention kernels, compiled and run on the device."""

from __future__ import annotations

import pytest
import torch
from tests.core.attention.triton import test_int8 as of_int8
from tests.core.attention.triton import test_kernels as cases
from tests.core.attention.triton.test_int8 import test_close_to_the_reference  # noqa: F401
from tests.core.attention.triton.test_kernels import (  # noqa: F401
    test_an_expanded_mask_is_one_for_all,
    test_half_precision,
    test_lengths_and_heads,
    test_masks,
    test_packed_samples,
    test_positions,
)

pytestmark = pytest.mark.usefixtures("on_the_device")


@pytest.fixture(autouse=True)
def _as_a_device_rounds(monkeypatch):
    """fp32 products are summed in another order than in the interpreter."""
    monkeypatch.setitem(cases.TOLERANCE, torch.float32, 2e-5)


@pytest.mark.parametrize("dim", [64, 96, 128, 256])
@pytest.mark.parametrize("limits", [{}, {"causal": True}, {"window": (40, 9)}])
def test_bf16_at_the_blocks_of_the_table(dim, limits, monkeypatch):
    """The interpreter refuses bf16, so only this test runs the rows of the table for it."""
    monkeypatch.setitem(cases.TOLERANCE, torch.bfloat16, 2e-2)
    cases.compare(cases.draw(257, 300, n=4, n_kv=2, d=dim, dtype=torch.bfloat16), **limits)


def test_int8_inputs_are_on_the_device():
    assert all(x.device.type != "cpu" for x in of_int8.draw())
