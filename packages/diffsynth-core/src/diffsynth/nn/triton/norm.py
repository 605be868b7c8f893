"""A norm, modulation and gated residual in one pass over a row.

    y = x,  x / sqrt(mean(x^2) + eps)  or  (x - mean(x)) / sqrt(var(x) + eps)
    y = y * weight + bias
    y = y * (1 + scale) + shift
    y = residual + gate * y

Every line but the first is skipped if its tensors are None. Zhang & Sennrich 2019 (arXiv:1910.07467), Ba et al. 2016
(arXiv:1607.06450), Peebles & Xie 2022 (arXiv:2212.09748).

Tolerance against the reference in fp64: fp32 2e-6 of the largest value; bf16 and fp16 one rounding, 2^-8 and 2^-11.
"""

# ruff: noqa: N803 - constexpr parameters are in capitals, as everywhere in Triton
from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from diffsynth.nn.triton.launch import block, dense_rows, launchable, strides, warps

KINDS = ("none", "rms", "layer")


@triton.jit(do_not_specialize=["rows"])
def norm_fwd_kernel(
    x, weight, bias, scale, shift, residual, gate, out,
    stride_xb, stride_xs, stride_cb, stride_cs, stride_hb, stride_hs, stride_rb, stride_rs, stride_gb, stride_gs,
    rows, width, eps,
    KIND: tl.constexpr, HAS_WEIGHT: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_SCALE: tl.constexpr,
    HAS_SHIFT: tl.constexpr, HAS_RESIDUAL: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_E: tl.constexpr,
):  # fmt: skip
    """Compute norm (KIND 0 none, 1 rms, 2 layer), modulation, gate and residual into BLOCK_R rows of `out`.

    The rows are of one sample; BLOCK_E holds a whole row.
    """
    i_block, i_b = tl.program_id(0), tl.program_id(1).to(tl.int64)
    o_r = (i_block * BLOCK_R + tl.arange(0, BLOCK_R)).to(tl.int64)[:, None]
    o_e = tl.arange(0, BLOCK_E)[None, :]
    m_e = o_e < width
    m_x = (o_r < rows) & m_e
    b_y = tl.load(x + i_b * stride_xb + o_r * stride_xs + o_e, mask=m_x, other=0.0).to(tl.float32)  # [BLOCK_R, BLOCK_E]
    if KIND == 2:
        b_y = tl.where(m_x, b_y - tl.sum(b_y, 1)[:, None] / width, 0.0)
    if KIND != 0:
        b_y = b_y / tl.sqrt(tl.sum(b_y * b_y, 1)[:, None] / width + eps)
    if HAS_WEIGHT:
        b_y *= tl.load(weight + o_e, mask=m_e, other=0.0).to(tl.float32)
    if HAS_BIAS:
        b_y += tl.load(bias + o_e, mask=m_e, other=0.0).to(tl.float32)
    if HAS_SCALE:
        b_y *= 1 + tl.load(scale + i_b * stride_cb + o_r * stride_cs + o_e, mask=m_x, other=0.0).to(tl.float32)
    if HAS_SHIFT:
        b_y += tl.load(shift + i_b * stride_hb + o_r * stride_hs + o_e, mask=m_x, other=0.0).to(tl.float32)
    if HAS_RESIDUAL:
        b_y *= tl.load(gate + i_b * stride_gb + o_r * stride_gs + o_e, mask=m_x, other=0.0).to(tl.float32)
        b_y += tl.load(residual + i_b * stride_rb + o_r * stride_rs + o_e, mask=m_x, other=0.0).to(tl.float32)
    tl.store(out + (i_b * rows + o_r) * width + o_e, b_y.to(out.dtype.element_ty), mask=m_x)


def config(width: int) -> dict[str, int]:
    """Return a dict of launch options for rows of `width` elements: BLOCK_R (rows of a block), BLOCK_E (elements of a
    padded row) and num_warps.
    """
    rows = max(1, min(16, 2048 // block(width)))
    return {"BLOCK_R": rows, "BLOCK_E": block(width), "num_warps": warps(rows * block(width))}


@torch.library.triton_op("diffsynth::norm", mutates_args=())
def norm(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    scale: Tensor | None,
    shift: Tensor | None,
    residual: Tensor | None,
    gate: Tensor | None,
    kind: str,
    eps: float,
) -> Tensor:
    """Return `x` (`b s e`) normalised, modulated, multiplied by `gate` and added to `residual`; steps whose tensors are
    None are skipped.

    `x` is `b s e`, `residual`, `scale`, `shift` and `gate` are `#b #s e`, `weight` and `bias` are `e`.
    """
    # Pointers of omitted tensors must be valid for Triton: `x` is passed for them, and never read.
    b, s, e = x.shape
    x = dense_rows(x)
    lines = [x if tensor is None else dense_rows(tensor) for tensor in (scale, shift, residual, gate)]
    out = torch.empty((b, s, e), dtype=x.dtype, device=x.device)
    sizes = config(e)
    launchable(norm_fwd_kernel)[(triton.cdiv(s, sizes["BLOCK_R"]), b)](
        x,
        x if weight is None else weight.contiguous(),
        x if bias is None else bias.contiguous(),
        *lines,
        out,
        *(stride for tensor in (x, *lines) for stride in strides(tensor, (b, s))),
        s,
        e,
        eps,
        KIND=KINDS.index(kind),
        HAS_WEIGHT=weight is not None,
        HAS_BIAS=bias is not None,
        HAS_SCALE=scale is not None,
        HAS_SHIFT=shift is not None,
        HAS_RESIDUAL=residual is not None,
        **sizes,
    )
    return out
