"""The kernels as two operators of PyTorch, `diffsynth::flash_attention` and its backward.

`triton_op` shows the kernels to `torch.compile`: no graph break, and the graph holds them rather than a black box.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import triton
from torch import Tensor
from torch.library import triton_op
from torch.nn.functional import pad

from diffsynth.core.attention.triton.backward import flash_delta_kernel, flash_dkdv_kernel, flash_dq_kernel
from diffsynth.core.attention.triton.configs import Kernel, capability_of, config_for
from diffsynth.core.attention.triton.forward import flash_fwd_kernel
from diffsynth.core.attention.triton.tiles import aligned_rows, block_lists, launchable
from diffsynth.core.device.backends import torch_module

LOG2_E = math.log2(math.e)
DELTA_ROWS = 32
"""Rows of `out` that a program of `flash_delta_kernel` sums; any number does, none was timed."""


@triton_op("diffsynth::flash_attention", mutates_args=())
def flash_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    cu_seqlens: Sequence[Tensor],
    scale: float,
    limits: Sequence[int],
) -> tuple[Tensor, Tensor]:
    """The output, `b q n d_v`, and the logsumexp in base 2, fp32 `b n q`. Differentiable once.

    Args:
        q, k, v: `b s n d`, as in `AttentionCall`.
        mask: as in `AttentionCall`; not beside `cu_seqlens`.
        cu_seqlens: of queries and of keys, or empty.
        scale: above 0.
        limits: `AttentionCall.limits`.
    """
    d_v = v.shape[3]
    q, k, v = (aligned(tensor) for tensor in (q, k, v))
    b, q_len, n, _ = q.shape
    out = torch.empty(b, q_len, n, v.shape[3], dtype=q.dtype, device=q.device)
    lse = torch.empty(b, n, q_len, dtype=torch.float32, device=q.device)
    with current(q.device):
        settings = settings_of("fwd", (q, k, v), mask, cu_seqlens, limits)
        launchable(flash_fwd_kernel)[(settings["tiles"] * n * b,)](
            q, k, v, out, lse, None, None, **settings, scale_log2=scale * LOG2_E, INT8=False
        )
    return out[..., :d_v], lse


@triton_op("diffsynth::flash_attention_backward", mutates_args=())
def flash_attention_backward(
    d_out: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    mask: Tensor | None,
    cu_seqlens: Sequence[Tensor],
    scale: float,
    limits: Sequence[int],
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of `q`, `k` and `v`, given that of `out`; the others as `flash_attention` took and gave them."""
    (n_kv, d), d_v = k.shape[2:], v.shape[3]
    q, k, v = (aligned(tensor) for tensor in (q, k, v))
    d_out, out = (aligned(tensor).contiguous() for tensor in (d_out, out))
    b, q_len, n, _ = out.shape
    rows = b * q_len * n
    delta = torch.empty_like(lse)
    dq = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    # One for each query head, added up below: a loop over the heads that share a key head makes the kernel spill.
    dk, dv = (torch.empty(b, x.shape[1], n, x.shape[3], dtype=x.dtype, device=x.device) for x in (k, v))
    factors = {"scale": scale, "scale_log2": scale * LOG2_E}
    with current(q.device):
        launchable(flash_delta_kernel)[(triton.cdiv(rows, DELTA_ROWS),)](
            out, d_out, delta, n, rows, q_len, D_V=out.shape[3], BLOCK_DV=padded(d_v), BLOCK_M=DELTA_ROWS
        )
        by_keys = settings_of("dkdv", (q, k, v), mask, cu_seqlens, limits)
        launchable(flash_dkdv_kernel)[(by_keys["tiles"] * n * b,)](
            q, k, v, d_out, lse, delta, dk, dv, **by_keys, **factors
        )
        by_queries = settings_of("dq", (q, k, v), mask, cu_seqlens, limits)
        launchable(flash_dq_kernel)[(by_queries["tiles"] * n * b,)](
            q, k, v, d_out, lse, delta, dq, **by_queries, **factors
        )
    if n > n_kv:
        dk, dv = (x.unflatten(2, (n_kv, -1)).sum(3) for x in (dk, dv))
    return dq[..., :d], dk[..., :d], dv[..., :d_v]


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    q, k, v, mask, cu_seqlens, ctx.scale, ctx.limits = inputs
    out, lse = output
    ctx.save_for_backward(q, k, v, out, lse, mask, *cu_seqlens)
    ctx.mark_non_differentiable(lse)


def _backward(ctx: Any, d_out: Tensor, _d_lse: Tensor | None) -> tuple[Any, ...]:
    *tensors, mask, cu_q, cu_k = (*ctx.saved_tensors, None, None)[:8]
    cu_seqlens = [] if cu_q is None else [cu_q, cu_k]
    gradients = flash_attention_backward(d_out, *tensors, mask, cu_seqlens, ctx.scale, ctx.limits)
    return *gradients, None, [None] * len(cu_seqlens), None, None


flash_attention.register_autograd(_backward, setup_context=_setup_context)


def settings_of(
    kernel: Kernel,
    qkv: tuple[Tensor, Tensor, Tensor],
    mask: Tensor | None,
    cu_seqlens: Sequence[Tensor],
    limits: Sequence[int],
) -> dict[str, Any]:
    """The arguments that the kernels have in common."""
    q, k, v = qkv
    (_, q_len, n, d), k_len, d_v = q.shape, k.shape[1], v.shape[3]
    by_keys = kernel == "dkdv"
    head_dim = max(padded(d), padded(d_v))
    config = config_for(kernel, head_dim, capability_of(q.device), fp32=q.dtype == torch.float32)
    left, right = limits
    cu_q, cu_k = cu_seqlens or (None, None)
    samples = 0 if cu_q is None else cu_q.shape[0] - 1
    tokens, block = (k_len, config.block_n) if by_keys else (q_len, config.block_m)
    lists, mask_strides = None, (0, 0, 0, 0)
    if mask is not None:
        lists = block_lists(mask, (q_len, k_len), (left, right), (config.block_m, config.block_n), by_keys=by_keys)
        mask = aligned_rows(mask)  # lists are kept for the mask that was given
        mask_strides = [0 if size == 1 else stride for size, stride in zip(mask.shape, mask.stride(), strict=True)]
    strides = {
        **_strides("q", "bsn", q.stride()),
        **_strides("k", "bsn", k.stride()),
        **_strides("v", "bsn", v.stride()),
        **_strides("m", "bnqk", mask_strides),
        **_strides("t", "bnt", (0, 0, 0) if lists is None else lists.strides),
    }
    return {
        **strides,
        "mask": mask,
        "blocks": None if lists is None else lists.blocks,
        "counts": None if lists is None else lists.counts,
        "cu_q": cu_q,
        "cu_k": cu_k,
        "heads": n,
        # A packed sample begins a tile of its own: at most one tile more for each, known without asking the device.
        "tiles": tokens // block + samples if samples else triton.cdiv(tokens, block),
        "q_len": q_len,
        "k_len": k_len,
        "samples": samples,
        "left": left,
        "right": right,
        "Q_PER_KV": n // k.shape[2],
        "D": d,
        "D_V": d_v,
        "BLOCK_D": padded(d),
        "BLOCK_DV": padded(d_v),
        "HAS_LEFT": left >= 0,
        "HAS_RIGHT": right >= 0,
        "HAS_MASK": mask is not None,
        "SAMPLES": triton.next_power_of_2(samples) if samples else 0,
        "BLOCK_M": config.block_m,
        "BLOCK_N": config.block_n,
        "num_warps": config.num_warps,
        "num_stages": config.num_stages,
    }


def _strides(tensor: str, axes: str, strides: Sequence[int]) -> dict[str, int]:
    return {f"stride_{tensor}{axis}": stride for axis, stride in zip(axes, strides, strict=False)}


def padded(dim: int) -> int:
    """The head dim of a block: a power of two that a matrix product takes."""
    return max(16, triton.next_power_of_2(dim))


def aligned(tensor: Tensor) -> Tensor:
    """The tensor, or a copy whose rows are dense and begin at multiples of 16 elements, with zeros behind the head dim.

    Triton loads such rows many numbers at a time. Loads of single numbers need so many registers that kernels spill.
    """
    if behind := -tensor.shape[3] % 16:
        return pad(tensor, (0, behind)).contiguous()
    is_aligned = tensor.stride(3) == 1 and all(stride % 16 == 0 for stride in tensor.stride()[:3])
    return tensor if is_aligned else tensor.contiguous()


def current(device: torch.device) -> AbstractContextManager[Any]:
    """Triton launches on the current device, which need not be that of the tensors."""
    module = torch_module(device.type)
    return nullcontext() if module is None else module.device(device)
