"""The table of configs has a row for every kernel, head dim and architecture."""

import itertools

import pytest

from diffsynth.core.attention.triton.configs import FP32, TABLE, config_for


@pytest.mark.parametrize("rows", [*TABLE.values(), FP32], ids=[*map(str, TABLE), "fp32"])
def test_complete_and_powers_of_two(rows):
    wanted = set(itertools.product(("fwd", "dkdv", "dq"), (64, 128, 256)))
    assert {(row.kernel, row.head_dim) for row in rows} == wanted
    assert len(rows) == len(wanted)
    for row in rows:
        assert all(x & (x - 1) == 0 for x in (row.block_m, row.block_n, row.num_warps))


def test_a_head_dim_takes_the_narrowest_row_that_holds_it():
    assert config_for("fwd", 16, 90, fp32=False).head_dim == 64
    assert config_for("fwd", 128, 90, fp32=False).head_dim == 128
    assert config_for("dq", 256, None, fp32=True).head_dim == 256


@pytest.mark.parametrize(("capability", "of"), [(87, 86), (103, 100), (120, 89), (121, 89)])
def test_an_architecture_that_is_not_there_takes_a_relative(capability, of):
    assert config_for("fwd", 128, capability, fp32=False) in TABLE[of]
