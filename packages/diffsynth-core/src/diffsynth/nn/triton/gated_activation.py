"""The gated activation between the two linear layers of a feed-forward layer (Shazeer 2020, arXiv:2002.05202).

    out = silu(gate) * up        or        gelu(gate) * up,  gelu(x) = x * sigmoid(2 sqrt(2 / pi) (x + 0.044715 x^3))

Tolerance against the reference in fp64: fp32 2e-6 of the largest value; bf16 and fp16 one rounding, 2^-8 and 2^-11.
"""

# ruff: noqa: N803 - constexpr parameters are in capitals, as everywhere in Triton
from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from diffsynth.nn.triton.launch import block, dense_rows, launchable, warps


@triton.jit(do_not_specialize=["rows"])
def gated_activation_fwd_kernel(
    gate, up, out, stride_gate, stride_up, rows, width,
    GELU: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_F: tl.constexpr,
):  # fmt: skip
    """Compute `silu(gate) * up`, or with GELU `gelu(gate) * up`, into BLOCK_F elements of BLOCK_R rows of `out`."""
    o_r = (tl.program_id(0) * BLOCK_R + tl.arange(0, BLOCK_R)).to(tl.int64)[:, None]
    o_f = tl.program_id(1) * BLOCK_F + tl.arange(0, BLOCK_F)[None, :]
    m_f = (o_r < rows) & (o_f < width)
    b_gate = tl.load(gate + o_r * stride_gate + o_f, mask=m_f, other=0.0).to(tl.float32)  # [BLOCK_R, BLOCK_F]
    b_up = tl.load(up + o_r * stride_up + o_f, mask=m_f, other=0.0).to(tl.float32)
    b_inner = b_gate
    if GELU:
        b_inner = 1.5957691216057308 * (b_gate + 0.044715 * b_gate * b_gate * b_gate)
    tl.store(out + o_r * width + o_f, (b_gate * tl.sigmoid(b_inner) * b_up).to(out.dtype.element_ty), mask=m_f)


def config(width: int) -> dict[str, int]:
    """Return a dict of launch options for rows of `width` elements: BLOCK_R (rows of a block), BLOCK_F (elements of a
    row in a block) and num_warps.
    """
    columns = min(block(width), 2048)
    rows = max(1, min(32, 2048 // columns))
    return {"BLOCK_R": rows, "BLOCK_F": columns, "num_warps": warps(rows * columns)}


@torch.library.triton_op("diffsynth::gated_activation", mutates_args=())
def gated_activation(gate: Tensor, up: Tensor, activation: str) -> Tensor:
    """Return the tensor `activation(gate) * up`, with activation "silu" or "gelu" (tanh approximation); `gate` and `up`
    (`*b f`) may be halves of one tensor.
    """
    width = gate.shape[-1]
    rows = [dense_rows(tensor.reshape(-1, width)) for tensor in (gate, up)]
    out = torch.empty(gate.shape, dtype=gate.dtype, device=gate.device)
    count, sizes = rows[0].shape[0], config(width)
    launchable(gated_activation_fwd_kernel)[
        (triton.cdiv(count, sizes["BLOCK_R"]), triton.cdiv(width, sizes["BLOCK_F"]))
    ](
        *rows,
        out,
        rows[0].stride(0),
        rows[1].stride(0),
        count,
        width,
        GELU=activation == "gelu",
        **sizes,
    )
    return out
