"""A norm of queries or keys, over each head or over all heads, and the rotary embedding of their position.

    y = x / sqrt(mean(x^2) + eps) * weight
    out[2i], out[2i + 1] = y[2i] * cos - y[2i + 1] * sin,  y[2i] * sin + y[2i + 1] * cos

Without a weight the first line is skipped. Zhang & Sennrich 2019 (arXiv:1910.07467), Su et al. 2021
(arXiv:2104.09864).

Tolerance against the reference in fp64: fp32 2e-6 of the largest value; bf16 and fp16 one rounding, 2^-8 and 2^-11.
"""

# ruff: noqa: N803 - constexpr parameters are in capitals, as everywhere in Triton
from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from diffsynth.nn.triton.launch import block, dense_rows, launchable, strides, warps

NO_NORM, PER_HEAD, ALL_HEADS = 0, 1, 2


@triton.jit(do_not_specialize=["tokens"])
def norm_rotary_fwd_kernel(
    x, weight, cos, sin, out,
    stride_xb, stride_xs, stride_xn, stride_cb, stride_cs, stride_sb, stride_ss,
    tokens, heads, dim, eps,
    NORM: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Compute norm (NORM 0 none, 1 each head, 2 all heads together) and rotation into BLOCK_T tokens of `out`."""
    i_b = tl.program_id(1).to(tl.int64)
    o_t = (tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)).to(tl.int64)[:, None, None]
    o_n, o_d = tl.arange(0, BLOCK_N)[None, :, None], tl.arange(0, BLOCK_D)[None, None, :]
    m_x = (o_t < tokens) & (o_n < heads) & (o_d < dim)
    b_y = tl.load(x + i_b * stride_xb + o_t * stride_xs + o_n * stride_xn + o_d, mask=m_x, other=0.0).to(tl.float32)
    if NORM == 1:
        b_y = b_y / tl.sqrt(tl.sum(b_y * b_y, 2)[:, :, None] / dim + eps)  # [BLOCK_T, BLOCK_N, BLOCK_D]
        b_y *= tl.load(weight + o_d, mask=o_d < dim, other=0.0).to(tl.float32)
    if NORM == 2:
        b_square = tl.sum(tl.sum(b_y * b_y, 2), 1)[:, None, None]
        b_y = b_y / tl.sqrt(b_square / (heads * dim) + eps)
        b_y *= tl.load(weight + o_n * dim + o_d, mask=(o_n < heads) & (o_d < dim), other=0.0).to(tl.float32)
    o_h = tl.arange(0, BLOCK_D // 2)[None, None, :]
    m_h = (o_t < tokens) & (o_h < dim // 2)
    b_cos = tl.load(cos + i_b * stride_cb + o_t * stride_cs + o_h, mask=m_h, other=0.0).to(tl.float32)
    b_sin = tl.load(sin + i_b * stride_sb + o_t * stride_ss + o_h, mask=m_h, other=0.0).to(tl.float32)
    b_even, b_odd = tl.split(tl.reshape(b_y, (BLOCK_T, BLOCK_N, BLOCK_D // 2, 2)))
    b_rotated = tl.join(b_even * b_cos - b_odd * b_sin, b_even * b_sin + b_odd * b_cos)
    b_out = tl.reshape(b_rotated, (BLOCK_T, BLOCK_N, BLOCK_D)).to(out.dtype.element_ty)
    tl.store(out + ((i_b * tokens + o_t) * heads + o_n) * dim + o_d, b_out, mask=m_x)


def config(heads: int, dim: int) -> dict[str, int]:
    """Return a dict of BLOCK_T (tokens), BLOCK_N (heads), BLOCK_D (channels) and num_warps for tokens of `heads` heads
    with `dim` channels.
    """
    token = block(heads) * block(dim)
    tokens = max(1, min(16, 2048 // token))
    return {"BLOCK_T": tokens, "BLOCK_N": block(heads), "BLOCK_D": block(dim), "num_warps": warps(tokens * token)}


@torch.library.triton_op("diffsynth::norm_rotary", mutates_args=())
def norm_rotary(x: Tensor, weight: Tensor | None, cos: Tensor, sin: Tensor, eps: float) -> Tensor:
    """Return queries or keys `x` (`b s n d`) after RMS norm, unless `weight` is None, and rotation by the angles of
    `cos` and `sin`.

    `x` is `b s n d`, `cos` and `sin` are `#b s half_d`, `weight` has `d` or `n * d` elements.
    """
    b, s, n, d = x.shape
    x, cos, sin = dense_rows(x), dense_rows(cos), dense_rows(sin)
    out = torch.empty((b, s, n, d), dtype=x.dtype, device=x.device)
    sizes = config(n, d)
    # With one head, both kinds of norm are the same.
    over = NO_NORM if weight is None else PER_HEAD if weight.shape[0] == d else ALL_HEADS
    launchable(norm_rotary_fwd_kernel)[(triton.cdiv(s, sizes["BLOCK_T"]), b)](
        x,
        x if weight is None else weight.contiguous(),
        cos,
        sin,
        out,
        *strides(x, (b, s, n)),
        *strides(cos, (b, s)),
        *strides(sin, (b, s)),
        s,
        n,
        d,
        eps,
        NORM=over,
        **sizes,
    )
    return out
