"""The cases of the CPU's tests of the small fused kernels, compiled and run on the device."""

from __future__ import annotations

import pytest
from tests.nn.triton.test_gated_activation import test_equals_the_reference as test_gated_equals_the_reference  # noqa: F401
from tests.nn.triton.test_gated_activation import test_far_from_zero, test_halves_of_one_tensor  # noqa: F401
from tests.nn.triton.test_norm import (  # noqa: F401
    test_eps_counts_where_the_input_is_small,
    test_inputs_may_have_any_strides,
    test_layer_norm_of_rows_far_from_zero,
    test_rms_norm_with_everything_after_it,
    test_without_a_norm,
)
from tests.nn.triton.test_norm_rotary import (  # noqa: F401
    test_16_bits_are_rounded_once,
    test_a_batch_shares_its_angles_and_inputs_may_have_any_strides,
    test_each_head_all_heads_and_no_norm,
)
from tests.nn.triton.test_sinusoidal import test_is_more_accurate_than_an_fp32_angle  # noqa: F401

pytestmark = pytest.mark.usefixtures("on_the_device")
