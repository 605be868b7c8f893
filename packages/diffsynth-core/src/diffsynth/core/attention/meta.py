"""Attention on the meta device: an output of the right shape, and the workspace that the backend would allocate.

Without this, PyTorch would decompose attention on the meta device into matrix products, and a memory trace would count
whole score matrices, which fused kernels never allocate.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass

import torch
from torch import Tensor

from diffsynth.core.attention import chunks
from diffsynth.core.attention.call import AttentionCall

Workspace = Callable[[AttentionCall, str], int]
"""(call, device type) -> bytes that a backend allocates beside inputs and output."""


@dataclass(frozen=True)
class MetaCall:
    """A call on the meta device, with the output and the workspace of the backend that would serve it.

    Args:
        call: the call.
        out: the output `b q n d_v`, contiguous, as kernels return it.
        declared: workspace function of the backend; None if it declares none.
    """

    call: AttentionCall
    out: Tensor
    declared: Workspace | None

    def workspace(self, device_type: str) -> int:
        """Return the backend's scratch memory for this call on a kind of device ("cuda"), in bytes; the size of the
        output if `declared` is None.
        """
        if self.declared is None:
            return self.out.numel() * self.out.element_size()
        return int(self.declared(self.call, device_type))

    @property
    def flops(self) -> int:
        """Number of floating-point operations of the two matrix products, an int, over all pairs of queries and keys,
        also those that may not attend.
        """
        b, q_len, n, d = self.call.q.shape
        return 2 * b * n * q_len * self.call.k.shape[1] * (d + self.call.v.shape[3])


_observer: ContextVar[Callable[[MetaCall], None] | None] = ContextVar("diffsynth_attention_observer", default=None)


@contextmanager
def observed_meta_calls(observer: Callable[[MetaCall], None]) -> Iterator[None]:
    """Context manager: until it ends, `observer` alone is called with the `MetaCall` of each `attention()` on the meta
    device in this thread or task.
    """
    token = _observer.set(observer)
    try:
        yield
    finally:
        _observer.reset(token)


def attend_on_meta(call: AttentionCall, workspace: Workspace | None) -> Tensor:
    """Return the output `b q n d_v` of a call on the meta device (no values); call the observer of
    `observed_meta_calls`, if any, with its `MetaCall`.
    """
    meta = _meta_call(call, workspace)
    if (observer := _observer.get()) is not None:
        observer(meta)
    return meta.out


def meta_call_of_sdpa(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> MetaCall:
    """Return the `MetaCall` (call, output and workspace) of a call of `F.scaled_dot_product_attention`, whose tensors
    are `b n s d` or lack leading axes.

    The parameters are those of PyTorch's function, by name and position, because callers pass on what other libraries
    gave it.
    """
    q, k, v = (x[(None,) * (4 - x.ndim)].transpose(1, 2) for x in (query, key, value))
    mask = None if attn_mask is None else attn_mask[(None,) * (4 - attn_mask.ndim)]
    is_bool = mask is not None and not mask.is_floating_point()
    call = AttentionCall(
        q,
        k,
        v,
        mask if is_bool else None,
        is_causal,
        query.shape[-1] ** -0.5 if scale is None else scale,
        score_bias=None if is_bool else mask,
    )
    return _meta_call(call, lambda call, device_type: fused_workspace(call))


def _meta_call(call: AttentionCall, workspace: Workspace | None) -> MetaCall:
    b, q_len, n, _ = call.q.shape
    return MetaCall(call, call.q.new_empty(b, q_len, n, call.v.shape[3]), workspace)


def fused_workspace(call: AttentionCall) -> int:
    """Return the scratch memory, in bytes, of a PyTorch kernel without a score matrix: the logsumexp of each query, the
    expanded mask and, with it, copies of grouped heads.

    The logsumexp is fp32 per query. PyTorch expands every mask to a tensor of scores that is added. Grouped
    heads are copied if there is a mask.
    """
    b, q_len, n, _ = call.q.shape
    size = 4 * b * n * q_len
    is_square_causal = call.limits == (-1, 0) and q_len == call.k_len
    if is_square_causal and call.mask is None and call.score_bias is None and call.cu_seqlens is None:
        return size
    added = _mask_elements(call)
    if added and call.q_per_kv > 1:
        size += sum(x.numel() * x.element_size() for x in (call.k, call.v)) * call.q_per_kv
    # The bool tensor of `allowed()`, and the scores that PyTorch makes of it.
    return size + added * (1 + call.q.element_size())


def score_matrix_workspace(call: AttentionCall, *, dtype: torch.dtype | None = None) -> int:
    """Return the scratch memory, in bytes, of a kernel that holds all scores: the scores, their softmax, and copies of
    q, k and v, all in `dtype` (None is the dtype of the call).
    """
    b, q_len, n, d = call.q.shape
    itemsize = call.q.element_size() if dtype is None else dtype.itemsize
    scores = 2 * b * n * q_len * call.k_len
    copies = b * n * (q_len * d + call.k_len * (d + call.v.shape[3]))
    return (scores + copies) * itemsize


def _mask_elements(call: AttentionCall) -> int:
    """Return an estimate of the number of elements, an int, of the largest mask or bias that `sdpa` passes to PyTorch;
    0 if it passes none.
    """
    given = max((tensor.numel() for tensor in (call.mask, call.score_bias) if tensor is not None), default=0)
    if call.offsets is not None:
        q_len, k_len = call.longest
        return q_len * k_len if call.limits != (-1, -1) else 0
    if call.limits == (-1, -1) and call.cu_seqlens is None:
        return given
    rows = call.q_len if call.cu_seqlens is not None else min(call.q_len, chunks.chunk_size(call))
    return max(given * rows // call.q_len, rows * call.k_len)
