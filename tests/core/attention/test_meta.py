"""Attention on the meta device: the output's shape, and the workspace that a backend declares."""

from unittest import mock

import pytest
import torch
import torch.nn.functional as F

from diffsynth.core.attention import attention, register_backend, use_attention
from diffsynth.core.attention.call import checked_call
from diffsynth.core.attention.meta import (
    MetaCall,
    fused_workspace,
    meta_call_of_sdpa,
    observed_meta_calls,
    score_matrix_workspace,
)
from diffsynth.core.attention.registry import BACKENDS


def on_meta(*shape, dtype=torch.float32):
    return torch.empty(shape, dtype=dtype, device="meta")


def seen(*tensors, **options) -> MetaCall:
    calls = []
    with observed_meta_calls(calls.append):
        out = attention(*tensors, **options)
    (call,) = calls
    assert out is call.out
    return call


def test_the_output_has_the_shape_dtype_and_layout_of_a_real_one():
    real = attention(torch.randn(2, 5, 4, 8), torch.randn(2, 7, 2, 8), torch.randn(2, 7, 2, 6))
    call = seen(on_meta(2, 5, 4, 8), on_meta(2, 7, 2, 8), on_meta(2, 7, 2, 6))
    assert (call.out.shape, call.out.dtype, call.out.is_meta) == (real.shape, real.dtype, True)
    assert call.out.is_contiguous()


def test_no_scores_are_held_by_fused_kernels_and_all_of_them_by_naive():
    tensors = [on_meta(1, 4096, 8, 64, dtype=torch.bfloat16)] * 3
    scores = 8 * 4096 * 4096
    assert seen(*tensors).workspace("cuda") < scores / 100
    with use_attention("naive"):
        assert seen(*tensors).workspace("cpu") > 2 * 4 * scores


def test_masks_are_counted_as_the_scores_that_torch_makes_of_them():
    tensors = [on_meta(1, 1024, 2, 64)] * 3
    plain = seen(*tensors).workspace("cpu")
    padding = seen(*tensors, mask=on_meta(1, 1, 1, 1024, dtype=torch.bool)).workspace("cpu")
    full = seen(*tensors, mask=on_meta(1, 1, 1024, 1024, dtype=torch.bool)).workspace("cpu")
    assert plain < padding < plain + 10_000
    assert full >= plain + 4 * 1024 * 1024
    assert seen(*tensors, causal=True).workspace("cpu") == plain


def test_flops_are_those_of_both_products():
    assert seen(on_meta(2, 5, 4, 8), on_meta(2, 7, 2, 8), on_meta(2, 7, 2, 6)).flops == 2 * 2 * 4 * 5 * 7 * (8 + 6)


@pytest.fixture
def registered():
    with mock.patch.dict(BACKENDS):
        yield register_backend


class Silent:
    def refuses(self, call):
        return None

    def __call__(self, call):
        raise AssertionError("there is nothing to compute")


def test_a_backend_without_a_declared_workspace_is_counted_as_its_output(registered):
    registered("silent", Silent())
    assert seen(*[on_meta(1, 16, 2, 8)] * 3, backend="silent").workspace("cuda") == 4 * 16 * 2 * 8


def test_a_declared_workspace_gets_the_call_and_the_device_type(registered):
    registered("declared", Silent(), workspace=lambda call, device_type: len(device_type) * call.q_len)
    assert seen(*[on_meta(1, 16, 2, 8)] * 3, backend="declared").workspace("cuda") == 4 * 16


def test_a_direct_call_of_scaled_dot_product_attention():
    q, k = torch.randn(2, 4, 5, 8), torch.randn(2, 4, 7, 8)
    mask = torch.rand(5, 7) > 0.5
    real = F.scaled_dot_product_attention(q, k, k, mask)
    call = meta_call_of_sdpa(q.to("meta"), k.to("meta"), k.to("meta"), mask.to("meta"))
    assert call.out.transpose(1, 2).shape == real.shape
    assert call.call.mask.shape == (1, 1, 5, 7)


def test_the_usual_workspaces_of_packed_and_windowed_calls():
    q = torch.randn(1, 4096, 2, 8)
    packed = checked_call(q, q, q, mask=None, causal=False, scale=None, window=None, score_bias=None,
                   cu_seqlens=torch.tensor([0, 1000, 4096], dtype=torch.int32))  # fmt: skip
    windowed = checked_call(
        q, q, q, mask=None, causal=False, scale=None, window=(64, 64), cu_seqlens=None, score_bias=None
    )
    assert fused_workspace(packed) == 4 * 2 * 4096
    assert fused_workspace(windowed) < score_matrix_workspace(windowed) / 5
