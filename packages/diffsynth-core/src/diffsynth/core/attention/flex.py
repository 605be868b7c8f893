"""FlexAttention (He et al. 2024, arXiv:2412.05496): a kernel compiled for any mask and any modification of scores.

Blocks of 128 x 128 without an allowed pair are skipped. On an accelerator the kernel is compiled at the first call of
its kind; on the CPU it runs uncompiled and holds the score matrix.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from diffsynth.core.attention.call import AttentionCall

ScoreMod = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor], Tensor]
"""(score, batch, head, query, key) -> score; all are scalars, and the indices integers."""

_DEVICES = ("cpu", "cuda", "xpu")
_MIN_HEAD_DIM = 16
"""Smallest head dim of the kernels on accelerators."""


class FlexAttention:
    """Backend that supports every option of `AttentionCall`; on the CPU without gradients."""

    def refuses(self, call: AttentionCall) -> str | None:
        """Return a text why the call is refused (its device, dtype or head dim, or gradients on the CPU), or None if it
        is served.
        """
        device = call.q.device.type
        if device not in _DEVICES:
            return f"tensors are on {device}; flex needs one of {', '.join(_DEVICES)}"
        halves = (torch.float16, torch.bfloat16, torch.float32)
        if call.q.dtype not in (halves if device != "cpu" else (*halves, torch.float64)):
            return f"dtype {call.q.dtype} is none of fp16, bf16, fp32"
        if device == "cpu" and call.needs_grad:
            return "on the CPU it has no gradients"
        if device != "cpu" and min(call.q.shape[-1], call.v.shape[-1]) < _MIN_HEAD_DIM:
            return f"head dims below {_MIN_HEAD_DIM} have no kernel"
        return None

    def avoids(self, call: AttentionCall) -> str | None:
        """Return a text, never None, why `auto` prefers other backends for every call: this one compiles a kernel for
        each kind of call.
        """
        return "it compiles a kernel for each kind of call, and is used only if selected by name"

    def __call__(self, call: AttentionCall) -> Float[Tensor, "b q n d_v"]:
        """Return the attention output in the dtype of `call.q`."""
        return flex(call)


def flex(call: AttentionCall, score_mod: ScoreMod | None = None) -> Float[Tensor, "b q n d_v"]:
    """Return the attention output `b q n d_v` of a call; `score_mod`, if given, changes the scaled scores after
    `score_bias` is added and before pairs are masked.
    """
    q, k, v = (x.transpose(1, 2) for x in (call.q, call.k, call.v))
    out = _kernel(call.q.device.type != "cpu")(
        q,
        k,
        v,
        score_mod=_score_mod(call.score_bias, score_mod),
        block_mask=_block_mask(call),
        scale=call.scale,
        enable_gqa=call.q_per_kv > 1,
    )
    return out.transpose(1, 2)


def _block_mask(call: AttentionCall) -> Any:
    """Return PyTorch's `BlockMask` of the pairs (query, key) that may attend in the call; None if every pair may
    attend.
    """
    mask_mod = _mask_mod(call)
    if mask_mod is None:
        return None
    from torch.nn.attention.flex_attention import create_block_mask

    b, n = (1, 1) if call.mask is None else call.mask.shape[:2]
    create = torch.compile(create_block_mask) if call.q.device.type != "cpu" else create_block_mask
    return create(mask_mod, b, n, call.q_len, call.k_len, device=call.q.device)


def _mask_mod(call: AttentionCall) -> Callable[..., Tensor] | None:
    conditions: list[Callable[..., Tensor]] = []
    shift: Callable[[Tensor], Tensor | int]
    if call.cu_seqlens is None:
        length = call.k_len - call.q_len

        def shift(q: Tensor) -> Tensor | int:
            return length
    else:
        of_q, of_k = (_samples(cu, size) for cu, size in zip(call.cu_seqlens, (call.q_len, call.k_len), strict=True))
        shifts = (call.cu_seqlens[1][1:] - call.cu_seqlens[0][1:])[of_q]

        def shift(q: Tensor) -> Tensor | int:
            return shifts[q]

        conditions.append(lambda b, n, q, k: of_q[q] == of_k[k])
    left, right = call.limits
    if left >= 0:
        conditions.append(lambda b, n, q, k: k >= q + shift(q) - left)
    if right >= 0:
        conditions.append(lambda b, n, q, k: k <= q + shift(q) + right)
    if call.mask is not None:
        conditions.append(_lookup(call.mask))
    if not conditions:
        return None
    return lambda b, n, q, k: functools.reduce(torch.logical_and, (one(b, n, q, k) for one in conditions))


def _samples(cu: Tensor, length: int) -> Tensor:
    """Return an int64 tensor: for each token, the index of the packed sample that it belongs to."""
    return torch.bucketize(torch.arange(length, dtype=cu.dtype, device=cu.device), cu[1:], right=True)


def _score_mod(bias: Tensor | None, score_mod: ScoreMod | None) -> ScoreMod | None:
    if bias is None:
        return score_mod
    bias_at = _lookup(bias)
    if score_mod is None:
        return lambda score, b, n, q, k: score + bias_at(b, n, q, k)
    return lambda score, b, n, q, k: score_mod(score + bias_at(b, n, q, k), b, n, q, k)


def _lookup(tensor: Tensor) -> Callable[..., Tensor]:
    """Return a function (b, n, q, k) -> element of `tensor` at these indices; an axis of size 1 is read at index 0."""
    b_is_1, n_is_1, q_is_1, k_is_1 = (size == 1 for size in tensor.shape)

    def entry(b: Tensor, n: Tensor, q: Tensor, k: Tensor) -> Tensor:
        return tensor[b * (not b_is_1), n * (not n_is_1), q * (not q_is_1), k * (not k_is_1)]

    return entry


@functools.cache
def _kernel(is_compiled: bool) -> Callable[..., Tensor]:
    # Importing FlexAttention is slow, so it is imported at the first call.
    from torch.nn.attention.flex_attention import flex_attention

    return torch.compile(flex_attention) if is_compiled else flex_attention
