"""The forward kernel of FlashAttention-2 (Dao 2023, arXiv:2307.08691), with an online softmax in base 2.

    out = softmax(scale * q k^T) v        lse = log2(sum(exp2(scale * log2(e) * q k^T)))  per row, fp32

A row without an allowed key gives zeros, and lse = +inf, so that its weights are 0 in the backward pass.
"""

# ruff: noqa: N803, N806 - constexpr parameters are in capitals, as everywhere in Triton
from __future__ import annotations

import triton
import triton.language as tl

from diffsynth.core.attention.triton.addressing import (
    block_at,
    columns_to_visit,
    load_rows,
    locate_sample,
    may_attend,
    program_indices,
    visit_range,
)


@triton.jit(do_not_specialize=["tiles", "q_len", "k_len", "samples", "left", "right"])
def flash_fwd_kernel(
    q, k, v, out, lse, q_scales, k_scales, mask, blocks, counts, cu_q, cu_k,
    stride_qb, stride_qs, stride_qn, stride_kb, stride_ks, stride_kn, stride_vb, stride_vs, stride_vn,
    stride_mb, stride_mn, stride_mq, stride_mk, stride_tb, stride_tn, stride_tt,
    heads, tiles, q_len, k_len, samples, scale_log2, left, right,
    Q_PER_KV: tl.constexpr, D: tl.constexpr, D_V: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
    HAS_LEFT: tl.constexpr, HAS_RIGHT: tl.constexpr, HAS_MASK: tl.constexpr, SAMPLES: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, INT8: tl.constexpr,
):  # fmt: skip
    """Compute the output `out` and the logsumexp `lse` of BLOCK_M queries of one head, by a loop over blocks of BLOCK_N
    keys, and store them.

    Without `mask`, positions bound the loop. With it, each list in `blocks` has the key blocks that a tile may attend
    in full, then those in part, and `counts` the number of full blocks and of all: see `tiles.block_lists`.

    With INT8, `q` and `k` are int8, and `q_scales` and `k_scales`, `b n blocks`, are the factors of their blocks.
    """
    i_tile, i_head, i_batch = program_indices(tl.program_id(0), tiles, heads, HAS_RIGHT)
    i_row, i_stat, k_tiles = i_batch * q_len, (i_batch * heads + i_head) * q_len, tl.cdiv(k_len, BLOCK_N)
    i_tile, q_start, k_start, q_len, k_len = locate_sample(
        cu_q, cu_q, cu_k, i_tile, samples, q_len, k_len, BLOCK_M, SAMPLES
    )
    row = i_tile * BLOCK_M
    o_m, o_n, o_d, o_dv = tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_N), tl.arange(0, BLOCK_D), tl.arange(0, BLOCK_DV)
    m_rows, m_d, m_dv = row + o_m < q_len, o_d < D, o_dv < D_V
    p_q = q + i_batch * stride_qb + i_head * stride_qn + (q_start + row) * stride_qs
    b_q = load_rows(p_q + o_m[:, None] * stride_qs + o_d[None, :], m_rows, m_d, True, D < BLOCK_D)
    p_k = k + i_batch * stride_kb + (i_head // Q_PER_KV) * stride_kn + k_start * stride_ks
    p_v = v + i_batch * stride_vb + (i_head // Q_PER_KV) * stride_vn + k_start * stride_vs
    o_k, o_v = o_n[:, None] * stride_ks + o_d[None, :], o_n[:, None] * stride_vs + o_dv[None, :]
    if HAS_MASK:
        mask += i_batch * stride_mb + i_head * stride_mn + row.to(tl.int64) * stride_mq
    if INT8:
        q_scale = tl.load(q_scales + (i_batch * heads + i_head) * tiles + i_tile)
        k_scales += (i_batch * heads + i_head) // Q_PER_KV * k_tiles
    i_list = i_batch * stride_tb + i_head * stride_tn + i_tile * stride_tt
    first, full_first, full_last, last = columns_to_visit(
        counts, i_list, row, q_len, k_len, left, right, HAS_LEFT, HAS_RIGHT, HAS_MASK, BLOCK_M, BLOCK_N
    )

    b_acc = tl.zeros([BLOCK_M, BLOCK_DV], dtype=tl.float32)
    b_peak = tl.full([BLOCK_M], float("-inf"), dtype=tl.float32)
    b_sum = tl.zeros([BLOCK_M], dtype=tl.float32)
    # Two loops, unrolled at compile time: full blocks skip all mask arithmetic, then the partial blocks apply it.
    for MASKED in tl.static_range(2):
        begin, end = visit_range(first, full_first, full_last, last, MASKED)
        for i in range(begin, end):
            i_block = block_at(i, blocks, i_list, k_tiles, full_first, full_last, MASKED, HAS_MASK)
            column = i_block * BLOCK_N
            m_columns = column + o_n < k_len
            b_k = load_rows(p_k + column.to(tl.int64) * stride_ks + o_k, m_columns, m_d, MASKED, D < BLOCK_D)
            b_scores = tl.dot(b_q, tl.trans(b_k), input_precision="ieee")
            if INT8:
                b_scores = b_scores.to(tl.float32) * (q_scale * tl.load(k_scales + i_block))
            if MASKED:
                p_mask = mask
                if HAS_MASK:
                    p_mask = mask + column.to(tl.int64) * stride_mk
                    p_mask += o_m[:, None] * stride_mq + o_n[None, :] * stride_mk
                m_pairs = may_attend(
                    row + o_m[:, None], column + o_n[None, :], q_len, k_len, left, right, p_mask,
                    HAS_LEFT, HAS_RIGHT, HAS_MASK,
                )  # fmt: skip
                b_scores = tl.where(m_pairs, b_scores, float("-inf"))
            b_weights, b_decay, b_peak, b_sum = _softmax_step(b_scores, b_peak, b_sum, scale_log2, MASKED)
            b_v = load_rows(p_v + column.to(tl.int64) * stride_vs + o_v, m_columns, m_dv, MASKED, D_V < BLOCK_DV)
            b_acc = tl.dot(b_weights.to(b_v.dtype), b_v, b_acc * b_decay[:, None], input_precision="ieee")

    b_total = tl.where(b_sum == 0.0, 1.0, b_sum)
    p_out = out + ((i_row + q_start + row) * heads + i_head) * D_V + o_m[:, None] * (heads * D_V) + o_dv[None, :]
    tl.store(p_out, (b_acc / b_total[:, None]).to(out.dtype.element_ty), mask=m_rows[:, None] & m_dv[None, :])
    b_lse = tl.where(b_sum == 0.0, float("inf"), b_peak + tl.log2(b_total))
    tl.store(lse + i_stat + q_start + row + o_m, b_lse, mask=m_rows)


@triton.jit
def _softmax_step(b_scores, b_peak, b_sum, scale_log2, MASKED: tl.constexpr):
    """Return (softmax weights of one more block of scores, factor by which earlier sums shrink, new maximum of each
    row, new sum of each row).
    """
    b_next = tl.maximum(b_peak, tl.max(b_scores, 1) * scale_log2)
    b_pivot = b_next
    if MASKED:  # keep the pivot finite for rows without an allowed key so far
        b_pivot = tl.where(b_next == float("-inf"), 0.0, b_next)
    b_weights = tl.exp2(tl.fma(b_scores, scale_log2, -b_pivot[:, None]))
    b_decay = tl.exp2(b_peak - b_pivot)
    return b_weights, b_decay, b_next, b_sum * b_decay + tl.sum(b_weights, 1)
