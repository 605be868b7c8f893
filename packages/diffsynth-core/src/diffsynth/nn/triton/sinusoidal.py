"""Sinusoids of the diffusion time in one launch (Vaswani et al. 2017, arXiv:1706.03762).

    out = cos(time * f), sin(time * f)        f_i = max_period ** (-i / (dim / 2))

Frequencies are formed in fp64, which is free at this size. Tolerance against fp64: 2^-22 of the largest angle, which is
what an fp32 angle can hold (1e-4 for times up to 1000).
"""

# ruff: noqa: N803 - constexpr parameters are in capitals, as everywhere in Triton
from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from diffsynth.nn.triton.launch import block, launchable, warps


@triton.jit
def sinusoidal_fwd_kernel(time, out, stride_time, half, MINUS_LOG_PERIOD: tl.constexpr, BLOCK_H: tl.constexpr):
    """The sinusoids of one sample."""
    i_b = tl.program_id(0).to(tl.int64)
    o_h = tl.arange(0, BLOCK_H)
    m_h = o_h < half
    b_frequency = tl.exp(o_h.to(tl.float64) * MINUS_LOG_PERIOD / half)
    b_angle = (tl.load(time + i_b * stride_time).to(tl.float64) * b_frequency).to(tl.float32)
    tl.store(out + i_b * 2 * half + o_h, tl.cos(b_angle), mask=m_h)
    tl.store(out + i_b * 2 * half + half + o_h, tl.sin(b_angle), mask=m_h)


@torch.library.triton_op("diffsynth::sinusoidal_embedding", mutates_args=())
def sinusoidal_embedding(time: Tensor, dim: int, max_period: float) -> Tensor:
    """See the module. `time` is `b`; the result is fp32."""
    half = dim // 2
    out = torch.empty((time.shape[0], 2 * half), dtype=torch.float32, device=time.device)
    launchable(sinusoidal_fwd_kernel)[(time.shape[0],)](
        time,
        out,
        time.stride(0),
        half,
        MINUS_LOG_PERIOD=-math.log(max_period),
        BLOCK_H=block(half),
        num_warps=warps(block(half)),
    )
    return out
