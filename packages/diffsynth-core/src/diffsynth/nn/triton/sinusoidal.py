"""Sinusoids of the diffusion time in one kernel (Vaswani et al. 2017, arXiv:1706.03762).

    out = cos(time * f), sin(time * f)        f_i = max_period ** (-i / (dim / 2))

Everything is computed in fp64, which costs nothing at this size: the angle is reduced to [-pi, pi], then both Taylor
series are summed to x^22, where the remainder is below 1e-11. (`tl.cos` keeps a table on the stack for large angles.)

Tolerance against fp64: 1e-6. The reference implementation computes angles in fp32, with an error of 1e-4 at 1000.
"""

# ruff: noqa: N803 - constexpr parameters are in capitals, as everywhere in Triton
from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from diffsynth.nn.triton.launch import block, launchable, warps

PER_TURN = tl.constexpr(1 / (2 * math.pi))


@triton.jit
def sinusoidal_fwd_kernel(time, out, stride_time, half, MINUS_LOG_PERIOD: tl.constexpr, BLOCK_H: tl.constexpr):
    """Compute the cosines, then the sines, of one entry of `time` into its row of `out`."""
    i_b = tl.program_id(0).to(tl.int64)
    o_h = tl.arange(0, BLOCK_H)
    m_h = o_h < half
    b_frequency = tl.exp(o_h.to(tl.float64) * MINUS_LOG_PERIOD / half)
    b_turns = tl.load(time + i_b * stride_time).to(tl.float64) * b_frequency * PER_TURN
    b_angle = (b_turns - tl.floor(b_turns + 0.5)) / PER_TURN
    b_square = b_angle * b_angle
    b_cos = tl.full([BLOCK_H], 1.0, tl.float64)
    b_sin = tl.full([BLOCK_H], 1.0, tl.float64)
    for i in tl.static_range(11):
        b_cos = 1 - b_cos * b_square * (1.0 / ((21 - 2 * i) * (22 - 2 * i)))
        b_sin = 1 - b_sin * b_square * (1.0 / ((22 - 2 * i) * (23 - 2 * i)))
    tl.store(out + i_b * 2 * half + o_h, b_cos.to(tl.float32), mask=m_h)
    tl.store(out + i_b * 2 * half + half + o_h, (b_sin * b_angle).to(tl.float32), mask=m_h)


@torch.library.triton_op("diffsynth::sinusoidal_embedding", mutates_args=())
def sinusoidal_embedding(time: Tensor, dim: int, max_period: float) -> Tensor:
    """Return an fp32 tensor `b dim`: the cosines, then the sines, of `time` (`b`) at `dim / 2` frequencies from 1 down
    to about 1 / max_period.
    """
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
