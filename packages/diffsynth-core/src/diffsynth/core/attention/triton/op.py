"""The kernels as PyTorch operators: `diffsynth::flash_attention` and `diffsynth::flash_attention_backward`.

`triton_op` lets `torch.compile` trace into them: there is no graph break, and the graph contains the kernels.
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
from diffsynth.core.attention.triton.tiles import aligned_rows, block_lists
from diffsynth.core.device.backends import torch_module
from diffsynth.nn.triton.launch import launchable

LOG2_E = math.log2(math.e)
DELTA_ROWS = 32
"""Rows of `out` per program of `flash_delta_kernel`; other values were not timed."""


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
    """Return (attention output `b q n d_v`, logsumexp of the scores in base 2, fp32 `b n q`); the output is
    differentiable once.

    Args:
        q, k, v: queries, keys and values `b s n d`, as in `AttentionCall`.
        mask: as in `AttentionCall`; None with `cu_seqlens`.
        cu_seqlens: int32 offsets of queries and of keys, or empty.
        scale: factor on the scores, above 0.
        limits: window (left, right), as `AttentionCall.limits`.
    """
    d_v = v.shape[3]
    q, k, v = (aligned(tensor) for tensor in (q, k, v))
    b, q_len, n, _ = q.shape
    out = torch.empty(b, q_len, n, v.shape[3], dtype=q.dtype, device=q.device)
    lse = torch.empty(b, n, q_len, dtype=torch.float32, device=q.device)
    with device_guard(q.device):
        arguments = kernel_arguments("fwd", (q, k, v), mask, cu_seqlens, limits)
        launchable(flash_fwd_kernel)[(arguments["tiles"] * n * b,)](
            q, k, v, out, lse, None, None, **arguments, scale_log2=scale * LOG2_E, INT8=False
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
    """Return three tensors, the gradients of `q`, `k` and `v`, for `d_out`, the gradient of the output `out` of
    `flash_attention`.
    """
    (n_kv, d), d_v = k.shape[2:], v.shape[3]
    q, k, v = (aligned(tensor) for tensor in (q, k, v))
    d_out, out = (aligned(tensor).contiguous() for tensor in (d_out, out))
    b, q_len, n, _ = out.shape
    rows = b * q_len * n
    delta = torch.empty_like(lse)
    dq = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    # One gradient per query head, added below: a loop over the query heads of a key head makes the kernel spill.
    dk, dv = (torch.empty(b, x.shape[1], n, x.shape[3], dtype=x.dtype, device=x.device) for x in (k, v))
    factors = {"scale": scale, "scale_log2": scale * LOG2_E}
    with device_guard(q.device):
        launchable(flash_delta_kernel)[(triton.cdiv(rows, DELTA_ROWS),)](
            out, d_out, delta, n, rows, q_len, D_V=out.shape[3], BLOCK_DV=padded(d_v), BLOCK_M=DELTA_ROWS
        )
        by_keys = kernel_arguments("dkdv", (q, k, v), mask, cu_seqlens, limits)
        launchable(flash_dkdv_kernel)[(by_keys["tiles"] * n * b,)](
            q, k, v, d_out, lse, delta, dk, dv, **by_keys, **factors
        )
        by_queries = kernel_arguments("dq", (q, k, v), mask, cu_seqlens, limits)
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


def kernel_arguments(
    kernel: Kernel,
    qkv: tuple[Tensor, Tensor, Tensor],
    mask: Tensor | None,
    cu_seqlens: Sequence[Tensor],
    limits: Sequence[int],
) -> dict[str, Any]:
    """Return a dict argument name -> value for a kernel ("fwd", "dkdv" or "dq"): block lists of the mask, strides,
    sizes, flags and launch options.
    """
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
        mask = aligned_rows(mask)  # after block_lists(), which caches lists by the original mask
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
        # Each packed sample begins a new tile: an upper bound that needs no offsets from the device.
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
    """Return `dim`, a head dim, padded to the next power of two, at least 16, which `tl.dot` needs."""
    return max(16, triton.next_power_of_2(dim))


def aligned(tensor: Tensor) -> Tensor:
    """Return `tensor` itself if its last axis is dense and a multiple of 16 long and its rows begin at multiples of 16
    elements, else a contiguous copy with the last axis zero-padded to a multiple of 16.

    Triton vectorises loads of such rows. Scalar loads need so many registers that the kernels spill.
    """
    if missing := -tensor.shape[3] % 16:
        return pad(tensor, (0, missing)).contiguous()
    is_aligned = tensor.stride(3) == 1 and all(stride % 16 == 0 for stride in tensor.stride()[:3])
    return tensor if is_aligned else tensor.contiguous()


def device_guard(device: torch.device) -> AbstractContextManager[Any]:
    """Return a context manager that makes `device` the current one, because Triton launches there; it does nothing for
    the CPU.
    """
    module = torch_module(device.type)
    return nullcontext() if module is None else module.device(device)
