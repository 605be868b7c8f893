"""Attention with queries and keys quantized to int8, as in SageAttention (Zhang et al. 2024, arXiv:2410.02367).

The mean key of each head is subtracted before quantization. It adds a constant to all scores of a query, which does not
change the softmax, and causes most of the quantization error. Queries and keys have one scale per block of tokens, the
block of the forward kernel; weights and values stay in 16 bits. Forward only.
"""

# ruff: noqa: N803 - constexpr parameters are in capitals, as everywhere in Triton
from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.library import triton_op

from diffsynth.core.attention.triton.addressing import load_rows, program_indices
from diffsynth.core.attention.triton.forward import flash_fwd_kernel
from diffsynth.core.attention.triton.op import LOG2_E, aligned, device_guard, kernel_arguments, padded
from diffsynth.nn.triton.launch import launchable


@triton_op("diffsynth::flash_attention_int8", mutates_args=())
def flash_attention_int8(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float, limits: Sequence[int]
) -> Tensor:
    """Return the attention output `b q n d_v` in the dtype of `q`, from queries and keys rounded to 8 bits; arguments
    as in `op.flash_attention`, which also has `cu_seqlens`.
    """
    d_v = v.shape[3]
    q, k, v = (aligned(tensor) for tensor in (q, k, v))
    b, q_len, n, _ = q.shape
    out = torch.empty(b, q_len, n, v.shape[3], dtype=q.dtype, device=q.device)
    lse = torch.empty(b, n, q_len, dtype=torch.float32, device=q.device)
    with device_guard(q.device):
        arguments = kernel_arguments("fwd", (q, k, v), mask, [], limits)
        q_int8, q_scales = quantize(q, None, arguments["BLOCK_M"])
        k_int8, k_scales = quantize(k, k.mean(1, dtype=torch.float32), arguments["BLOCK_N"])
        for name, x in (("q", q_int8), ("k", k_int8)):
            arguments |= {f"stride_{name}{axis}": stride for axis, stride in zip("bsn", x.stride(), strict=False)}
        launchable(flash_fwd_kernel)[(arguments["tiles"] * n * b,)](
            q_int8, k_int8, v, out, lse, q_scales, k_scales, **arguments, scale_log2=scale * LOG2_E, INT8=True
        )
    return out[..., :d_v]


def quantize(x: Tensor, mean: Tensor | None, block: int) -> tuple[Tensor, Tensor]:
    """Return (int8 tensor, fp32 scales `b n blocks`): `x`, minus `mean` unless it is None, divided by one scale per
    `block` tokens of a head and rounded.
    """
    b, length, n, d = x.shape
    tiles = triton.cdiv(length, block)
    quantized = torch.empty(b, length, n, d, dtype=torch.int8, device=x.device)
    scales = torch.empty(b, n, tiles, dtype=torch.float32, device=x.device)
    launchable(quantize_kernel)[(tiles * n * b,)](
        x, mean, quantized, scales, *x.stride()[:3], n, tiles, length,
        HAS_MEAN=mean is not None, D=d, BLOCK_D=padded(d), BLOCK=block,
    )  # fmt: skip
    return quantized, scales


@triton.jit(do_not_specialize=["tiles", "length"])
def quantize_kernel(
    x, mean, quantized, scales, stride_b, stride_s, stride_n, heads, tiles, length,
    HAS_MEAN: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Store `round((x - mean) / scale)` of BLOCK tokens of a head in int8 `quantized`, and `scale = max|x - mean| /
    127` (1 if all are 0) in `scales`; without HAS_MEAN, the mean is 0.

    x is `b s n d`, mean `b n d`, quantized `b s n d`, scales `b n tiles`; the last three are contiguous.
    """
    i_tile, i_head, i_batch = program_indices(tl.program_id(0), tiles, heads, False)
    row = i_tile * BLOCK
    o_s, o_d = tl.arange(0, BLOCK), tl.arange(0, BLOCK_D)
    m_rows, m_d = row + o_s < length, o_d < D
    p_x = x + i_batch * stride_b + i_head * stride_n + row.to(tl.int64) * stride_s
    b_x = load_rows(p_x + o_s[:, None] * stride_s + o_d[None, :], m_rows, m_d, True, D < BLOCK_D).to(tl.float32)
    if HAS_MEAN:
        b_x -= tl.load(mean + (i_batch * heads + i_head) * D + o_d, mask=m_d, other=0.0)[None, :]
    m_block = m_rows[:, None] & m_d[None, :]
    largest = tl.max(tl.max(tl.where(m_block, tl.abs(b_x), 0.0), 1), 0)
    scale = tl.where(largest == 0.0, 1.0, largest / 127.0)
    p_out = quantized + ((i_batch * length + row) * heads + i_head) * D
    tl.store(p_out + o_s[:, None] * (heads * D) + o_d[None, :], tl.floor(b_x / scale + 0.5).to(tl.int8), mask=m_block)
    tl.store(scales + (i_batch * heads + i_head) * tiles + i_tile, scale)
