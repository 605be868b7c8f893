"""Refusals of the backend with their reasons, calls that it avoids, and its workspace."""

import pytest
import torch

from diffsynth.core.attention import attention
from diffsynth.core.attention.call import checked_call
from diffsynth.core.attention.select import choose
from diffsynth.core.attention.triton.backend import TritonAttention
from diffsynth.errors import Refused


def zeros(q_len=4, k_len=4, d=16, d_v=None, dtype=torch.float32, device="cpu"):
    sizes = ((q_len, d), (k_len, d), (k_len, d_v or d))
    return [torch.zeros(1, length, 2, dim, dtype=dtype, device=device) for length, dim in sizes]


@pytest.mark.parametrize(
    ("tensors", "arguments", "reason"),
    [
        ({"d": 264}, {}, "head dim 264 of queries and keys is over 256"),
        ({"d_v": 257}, {}, "head dim 257 of values"),
        ({"dtype": torch.float64}, {}, "dtype torch.float64 is none of fp16, bf16, fp32"),
        ({"dtype": torch.bfloat16}, {}, "interpreter multiplies bf16"),
        ({"device": "meta"}, {}, "tensors are on meta; triton needs cuda"),
        ({}, {"score_bias": torch.zeros(1, 1, 4, 4)}, "it takes no score_bias"),
        ({}, {"scale": -1.0}, "scale -1.0 is not above 0"),
        ({}, {"scale": float("nan")}, "scale nan is not above 0"),
    ],
)
def test_reasons(tensors, arguments, reason):
    assert reason in TritonAttention().refuses(checked_call(*zeros(**tensors), **arguments))


def test_a_mask_beside_packed_samples():
    packed = torch.tensor([0, 4], dtype=torch.int32)
    mask = torch.ones(1, 1, 4, 4, dtype=torch.bool)
    with pytest.raises(Refused, match="'triton' refuses this call: it takes a mask or cu_seqlens, not both"):
        attention(*zeros(), mask=mask, cu_seqlens=packed, backend="triton")


def test_a_cpu_without_the_interpreter(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET")
    with pytest.raises(Refused, match="tensors are on cpu.*TRITON_INTERPRET=1"):
        attention(*zeros(), backend="triton")


def test_auto_takes_another_one():
    call = checked_call(*zeros())
    assert TritonAttention().avoids(call) == "Triton's interpreter is slow"
    assert choose(call) != "triton"


def test_what_nobody_timed_is_avoided(monkeypatch):
    monkeypatch.setattr("diffsynth.core.attention.triton.backend.capability_of", lambda device: 100)
    assert TritonAttention().avoids(checked_call(*zeros())) == "its kernels were not timed on sm_100"


def test_workspace_is_a_sum_per_query_a_word_per_block_and_what_is_padded():
    q, k, v = zeros(130, 70)
    assert TritonAttention().workspace(checked_call(q, k, v), "cpu") == 4 * 2 * 130
    mask = torch.ones(1, 1, 1, 70, dtype=torch.bool)
    assert TritonAttention().workspace(checked_call(q, k, v, mask=mask), "cpu") == 4 * 2 * 130 + 3 * 2 * 13 + 80
    q, k, v = zeros(130, 70, d=60, d_v=64)
    assert TritonAttention().workspace(checked_call(q, k, v), "cpu") == 4 * 2 * 130 + 4 * 2 * 64 * (130 + 70)
