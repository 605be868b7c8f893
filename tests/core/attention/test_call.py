"""Checks of the arguments of `attention()`, and the `AttentionCall` that is made of them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from diffsynth.core.attention import attention
from diffsynth.core.attention.call import checked_call


def offsets(*values: int) -> Tensor:
    return torch.tensor(values, dtype=torch.int32)


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"q": torch.zeros(2, 4, 3)}, ValueError, "four axes"),
        ({"k": torch.zeros(2, 6, 2, 7)}, ValueError, "do not fit"),
        ({"q": torch.zeros(2, 4, 3, 8)}, ValueError, "3 query heads are not a multiple of 2 key heads"),
        ({"v": torch.zeros(2, 6, 2, 8, dtype=torch.bfloat16)}, ValueError, "q, k and v differ"),
        (
            {"q": torch.zeros(2, 0, 4, 8)},
            ValueError,
            r"attention over empty tensors: q \(2, 0, 4, 8\), k \(2, 6, 2, 8\)",
        ),
        ({"k": torch.zeros(2, 0, 2, 8), "v": torch.zeros(2, 0, 2, 8)}, ValueError, "empty tensors.*at least 1 long"),
        ({"mask": torch.zeros(2, 1, 4, 6)}, TypeError, r"mask is torch.float32; expected bool.*score_bias="),
        ({"mask": torch.ones(2, 1, 4, 6, dtype=torch.bool, device="meta")}, ValueError, "mask is on meta, q on cpu"),
        ({"score_bias": torch.ones(2, 1, 4, 6, dtype=torch.int32)}, TypeError, "score_bias is torch.int32; expected"),
        ({"score_bias": torch.ones(2, 1, 4, 6).half()}, TypeError, "expected torch.float32, as q"),
        ({"score_bias": torch.ones(4, 6)}, ValueError, r"score_bias of shape \(4, 6\) does not broadcast"),
        ({"mask": torch.ones(4, 6, dtype=torch.bool)}, ValueError, r"does not broadcast to 'b n q k' = \(2, 4, 4, 6\)"),
        ({"mask": torch.ones(2, 3, 4, 6, dtype=torch.bool)}, ValueError, "does not broadcast"),
        ({"window": (3, 1), "causal": True}, ValueError, r"right of the diagonal.*expected \(3, 0\)"),
        ({"window": (3, -1), "causal": True}, ValueError, "right of the diagonal"),
        ({"window": (-2, 1)}, ValueError, r"window=\(-2, 1\); expected \(left, right\)"),
        ({"window": (1, 2, 3)}, ValueError, "expected \\(left, right\\)"),
        ({"cu_seqlens": offsets(0, 4)}, ValueError, "a batch of 1, but q is"),
    ],
)
def test_arguments_that_do_not_fit(changes: dict[str, Any], error: type[Exception], message: str) -> None:
    arguments = {"q": torch.zeros(2, 4, 4, 8), "k": torch.zeros(2, 6, 2, 8), "v": torch.zeros(2, 6, 2, 8)} | changes
    with pytest.raises(error, match=message):
        attention(**arguments)


@pytest.mark.parametrize(
    ("cu_seqlens", "error", "message"),
    [
        ((0, 4), ValueError, "one tensor for 4 queries and 6 keys; expected a pair"),
        (((0, 3), (0, 6)), ValueError, r"of queries is \[0, 3\]; expected ascending offsets from 0 to 4"),
        (((1, 4), (0, 6)), ValueError, r"of queries is \[1, 4\]"),
        (((0, 4), (0, 7)), ValueError, r"of keys is \[0, 7\]; expected ascending offsets from 0 to 6"),
        (((0, 2, 4), (0, 7, 6)), ValueError, r"of keys is \[0, 7, 6\]; expected ascending"),
        (((0, 2, 4), (0, 6)), ValueError, "2 samples of queries and 1 of keys"),
        (((0,), (0,)), ValueError, r"shape \(1,\); expected \(samples \+ 1,\)"),
    ],
)
def test_offsets_that_do_not_fit(cu_seqlens: Any, error: type[Exception], message: str) -> None:
    pair = isinstance(cu_seqlens[0], tuple)
    given = tuple(offsets(*one) for one in cu_seqlens) if pair else offsets(*cu_seqlens)
    with pytest.raises(error, match=message):
        attention(torch.zeros(1, 4, 4, 8), torch.zeros(1, 6, 2, 8), torch.zeros(1, 6, 2, 8), cu_seqlens=given)


def test_offsets_are_int32() -> None:
    q = torch.zeros(1, 4, 4, 8)
    with pytest.raises(TypeError, match="cu_seqlens of queries is torch.int64; expected torch.int32"):
        attention(q, q, q, cu_seqlens=torch.tensor([0, 4]))


def test_a_window_without_limits_is_none() -> None:
    q = torch.zeros(1, 4, 4, 8)
    assert checked_call(q, q, q, window=(-1, -1)).window is None
    assert checked_call(q, q, q, window=(-1, -1), causal=True).limits == (-1, 0)
