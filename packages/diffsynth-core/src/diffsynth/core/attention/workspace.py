"""What attention kernels take beside inputs and output, in bytes; what backends answer when a plan asks them."""

from __future__ import annotations

import torch

from diffsynth.core.attention import chunks
from diffsynth.core.attention.call import AttentionCall


def fused(call: AttentionCall) -> int:
    """Of kernels that hold no scores: an fp32 sum per query, and whatever has to be one tensor of scores to add.

    PyTorch makes such a tensor of every mask. Grouped heads beside it are copied out.
    """
    b, q_len, n, _ = call.q.shape
    size = 4 * b * n * q_len
    is_square_causal = call.limits == (-1, 0) and q_len == call.k_len
    if is_square_causal and call.mask is None and call.score_bias is None and call.cu_seqlens is None:
        return size
    added = _added(call)
    if added and call.q_per_kv > 1:
        size += sum(x.numel() * x.element_size() for x in (call.k, call.v)) * call.q_per_kv
    # The bool tensor that the call becomes, and the scores that PyTorch makes of it.
    return size + added * (1 + call.q.element_size())


def score_matrix(call: AttentionCall, *, dtype: torch.dtype | None = None) -> int:
    """Of implementations that hold all scores, and their softmax beside them; None is the dtype of the call."""
    b, q_len, n, d = call.q.shape
    itemsize = call.q.element_size() if dtype is None else dtype.itemsize
    scores = 2 * b * n * q_len * call.k_len
    copies = b * n * (q_len * d + call.k_len * (d + call.v.shape[3]))
    return (scores + copies) * itemsize


def _added(call: AttentionCall) -> int:
    """Elements of the mask or bias that PyTorch is given."""
    given = max((tensor.numel() for tensor in (call.mask, call.score_bias) if tensor is not None), default=0)
    if call.offsets is not None:
        q_len, k_len = call.longest
        return q_len * k_len if call.limits != (-1, -1) else 0
    if call.limits == (-1, -1) and call.cu_seqlens is None:
        return given
    rows = call.q_len if call.cu_seqlens is not None else min(call.q_len, _chunk(call))
    return max(given * rows // call.q_len, rows * call.k_len)


def _chunk(call: AttentionCall) -> int:
    """Queries of a piece, see `chunks.by_chunk`."""
    left, right = call.limits
    return max(chunks.CHUNK, left + right + 1 if left >= 0 and right >= 0 else 4 * chunks.CHUNK)
