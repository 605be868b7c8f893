"""The backward kernels of FlashAttention-2 (Dao 2023, arXiv:2307.08691); weights are recomputed from the logsumexp.

    w = exp2(scale * log2(e) * q k^T - lse)         delta = sum(out * d_out, -1)
    ds = w * (d_out v^T - delta)
    dv = w^T d_out        dk = scale * ds^T q        dq = scale * ds k

One kernel computes dk and dv for a tile of keys, another dq for a tile of queries. Without atomic additions, gradients
are deterministic. A row without an allowed key has lse = +inf, so its weights and gradients are 0.
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
    rows_to_visit,
    visit_range,
)


@triton.jit(do_not_specialize=["rows", "q_len"])
def flash_delta_kernel(
    out, d_out, delta, heads, rows, q_len, D_V: tl.constexpr, BLOCK_DV: tl.constexpr, BLOCK_M: tl.constexpr
):
    """Compute the sum over channels of `out * d_out` for BLOCK_M rows (one head of one query each), and store it in
    fp32 `delta[b, n, q]`.

    `out` and `d_out` are contiguous and have `rows = b * q_len * n` rows.
    """
    o_row = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    o_dv = tl.arange(0, BLOCK_DV)
    m_row = o_row < rows
    o_block = o_row[:, None] * D_V + o_dv[None, :]
    m_block = m_row[:, None] & (o_dv < D_V)[None, :]
    b_out = tl.load(out + o_block, mask=m_block, other=0.0).to(tl.float32)
    b_d_out = tl.load(d_out + o_block, mask=m_block, other=0.0).to(tl.float32)
    i_head, i_token = o_row % heads, o_row // heads
    o_delta = ((i_token // q_len) * heads + i_head) * q_len + i_token % q_len
    tl.store(delta + o_delta, tl.sum(b_out * b_d_out, 1), mask=m_row)


@triton.jit(do_not_specialize=["tiles", "q_len", "k_len", "samples", "left", "right"])
def flash_dkdv_kernel(
    q, k, v, d_out, lse, delta, dk, dv, mask, blocks, counts, cu_q, cu_k,
    stride_qb, stride_qs, stride_qn, stride_kb, stride_ks, stride_kn, stride_vb, stride_vs, stride_vn,
    stride_mb, stride_mn, stride_mq, stride_mk, stride_tb, stride_tn, stride_tt,
    heads, tiles, q_len, k_len, samples, scale, scale_log2, left, right,
    Q_PER_KV: tl.constexpr, D: tl.constexpr, D_V: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
    HAS_LEFT: tl.constexpr, HAS_RIGHT: tl.constexpr, HAS_MASK: tl.constexpr, SAMPLES: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Compute the gradients `dk` and `dv` of BLOCK_N keys for one query head, by a loop over blocks of BLOCK_M queries,
    and store them.

    Query heads that share a key head have a gradient each; `op` adds them. `blocks` and `counts` are those of
    `flash_fwd_kernel`, but a list has the query blocks of a tile of keys.
    """
    i_tile, i_head, i_batch = program_indices(tl.program_id(0), tiles, heads, HAS_LEFT)
    tokens, i_key, q_tiles = q_len, i_batch * k_len, tl.cdiv(q_len, BLOCK_M)
    i_tile, q_start, k_start, q_len, k_len = locate_sample(
        cu_k, cu_q, cu_k, i_tile, samples, q_len, k_len, BLOCK_N, SAMPLES
    )
    column = i_tile * BLOCK_N
    o_m, o_n, o_d, o_dv = tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_N), tl.arange(0, BLOCK_D), tl.arange(0, BLOCK_DV)
    m_columns, m_d, m_dv = column + o_n < k_len, o_d < D, o_dv < D_V
    p_k = k + i_batch * stride_kb + (i_head // Q_PER_KV) * stride_kn + (k_start + column) * stride_ks
    p_v = v + i_batch * stride_vb + (i_head // Q_PER_KV) * stride_vn + (k_start + column) * stride_vs
    b_k = load_rows(p_k + o_n[:, None] * stride_ks + o_d[None, :], m_columns, m_d, True, D < BLOCK_D)
    b_v = load_rows(p_v + o_n[:, None] * stride_vs + o_dv[None, :], m_columns, m_dv, True, D_V < BLOCK_DV)
    o_q, o_do = o_m[:, None] * stride_qs + o_d[None, :], o_m[:, None] * (heads * D_V) + o_dv[None, :]
    if HAS_MASK:
        mask += i_batch * stride_mb + column.to(tl.int64) * stride_mk

    b_dk = tl.zeros([BLOCK_N, BLOCK_D], dtype=tl.float32)
    b_dv = tl.zeros([BLOCK_N, BLOCK_DV], dtype=tl.float32)
    i_list = i_batch * stride_tb + i_head * stride_tn + i_tile * stride_tt
    first, full_first, full_last, last = rows_to_visit(
        counts, i_list, column, q_len, k_len, left, right, HAS_LEFT, HAS_RIGHT, HAS_MASK, BLOCK_M, BLOCK_N
    )
    p_q = q + i_batch * stride_qb + i_head * stride_qn + q_start * stride_qs
    p_do = d_out + ((i_batch * tokens + q_start) * heads + i_head) * D_V
    i_stat = (i_batch * heads + i_head) * tokens + q_start
    for MASKED in tl.static_range(2):
        begin, end = visit_range(first, full_first, full_last, last, MASKED)
        for i in range(begin, end):
            i_block = block_at(i, blocks, i_list, q_tiles, full_first, full_last, MASKED, HAS_MASK)
            row = i_block * BLOCK_M
            m_rows = row + o_m < q_len
            ends = HAS_MASK or MASKED  # with a mask, a full block may have rows past the last query
            b_q = load_rows(p_q + row.to(tl.int64) * stride_qs + o_q, m_rows, m_d, ends, D < BLOCK_D)
            p_rows = p_do + row.to(tl.int64) * (heads * D_V)
            b_do = load_rows(p_rows + o_do, m_rows, m_dv, ends, D_V < BLOCK_DV)
            b_lse = tl.load(lse + i_stat + row + o_m, mask=m_rows, other=float("inf"))
            b_delta = tl.load(delta + i_stat + row + o_m, mask=m_rows, other=0.0)
            b_scores = tl.dot(b_k, tl.trans(b_q), input_precision="ieee")
            b_weights = tl.exp2(tl.fma(b_scores, scale_log2, -b_lse[None, :]))
            if MASKED:
                p_mask = mask
                if HAS_MASK:
                    p_mask = mask + i_head * stride_mn + row.to(tl.int64) * stride_mq
                    p_mask += o_m[None, :] * stride_mq + o_n[:, None] * stride_mk
                m_pairs = may_attend(
                    row + o_m[None, :], column + o_n[:, None], q_len, k_len, left, right, p_mask,
                    HAS_LEFT, HAS_RIGHT, HAS_MASK,
                )  # fmt: skip
                b_weights = tl.where(m_pairs, b_weights, 0.0)
            b_dv = tl.dot(b_weights.to(b_do.dtype), b_do, b_dv, input_precision="ieee")
            b_dw = tl.dot(b_v, tl.trans(b_do), input_precision="ieee")
            b_ds = b_weights * (b_dw - b_delta[None, :])
            b_dk = tl.dot(b_ds.to(b_q.dtype), b_q, b_dk, input_precision="ieee")

    i_out = (i_key + k_start + column) * heads + i_head
    _store_rows(dk + i_out * D + o_n[:, None] * (heads * D) + o_d[None, :], b_dk * scale, m_columns, m_d)
    _store_rows(dv + i_out * D_V + o_n[:, None] * (heads * D_V) + o_dv[None, :], b_dv, m_columns, m_dv)


@triton.jit(do_not_specialize=["tiles", "q_len", "k_len", "samples", "left", "right"])
def flash_dq_kernel(
    q, k, v, d_out, lse, delta, dq, mask, blocks, counts, cu_q, cu_k,
    stride_qb, stride_qs, stride_qn, stride_kb, stride_ks, stride_kn, stride_vb, stride_vs, stride_vn,
    stride_mb, stride_mn, stride_mq, stride_mk, stride_tb, stride_tn, stride_tt,
    heads, tiles, q_len, k_len, samples, scale, scale_log2, left, right,
    Q_PER_KV: tl.constexpr, D: tl.constexpr, D_V: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
    HAS_LEFT: tl.constexpr, HAS_RIGHT: tl.constexpr, HAS_MASK: tl.constexpr, SAMPLES: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Compute the gradient `dq` of BLOCK_M queries of one head, by a loop over the key blocks that `flash_fwd_kernel`
    visits, and store it.
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
    i_out = (i_row + q_start + row) * heads + i_head
    p_do = d_out + i_out * D_V + o_m[:, None] * (heads * D_V) + o_dv[None, :]
    b_do = load_rows(p_do, m_rows, m_dv, True, D_V < BLOCK_DV)
    b_lse = tl.load(lse + i_stat + q_start + row + o_m, mask=m_rows, other=float("inf"))
    b_delta = tl.load(delta + i_stat + q_start + row + o_m, mask=m_rows, other=0.0)
    p_k = k + i_batch * stride_kb + (i_head // Q_PER_KV) * stride_kn + k_start * stride_ks
    p_v = v + i_batch * stride_vb + (i_head // Q_PER_KV) * stride_vn + k_start * stride_vs
    o_k, o_v = o_n[:, None] * stride_ks + o_d[None, :], o_n[:, None] * stride_vs + o_dv[None, :]
    if HAS_MASK:
        mask += i_batch * stride_mb + i_head * stride_mn + row.to(tl.int64) * stride_mq
    i_list = i_batch * stride_tb + i_head * stride_tn + i_tile * stride_tt
    first, full_first, full_last, last = columns_to_visit(
        counts, i_list, row, q_len, k_len, left, right, HAS_LEFT, HAS_RIGHT, HAS_MASK, BLOCK_M, BLOCK_N
    )

    b_dq = tl.zeros([BLOCK_M, BLOCK_D], dtype=tl.float32)
    # The two loops of the forward kernel. lse is +inf for rows without an allowed key, so their weights are 0.
    for MASKED in tl.static_range(2):
        begin, end = visit_range(first, full_first, full_last, last, MASKED)
        for i in range(begin, end):
            i_block = block_at(i, blocks, i_list, k_tiles, full_first, full_last, MASKED, HAS_MASK)
            column = i_block * BLOCK_N
            m_columns = column + o_n < k_len
            b_k = load_rows(p_k + column.to(tl.int64) * stride_ks + o_k, m_columns, m_d, MASKED, D < BLOCK_D)
            b_v = load_rows(p_v + column.to(tl.int64) * stride_vs + o_v, m_columns, m_dv, MASKED, D_V < BLOCK_DV)
            b_scores = tl.dot(b_q, tl.trans(b_k), input_precision="ieee")
            b_weights = tl.exp2(tl.fma(b_scores, scale_log2, -b_lse[:, None]))
            if MASKED:
                p_mask = mask
                if HAS_MASK:
                    p_mask = mask + column.to(tl.int64) * stride_mk
                    p_mask += o_m[:, None] * stride_mq + o_n[None, :] * stride_mk
                m_pairs = may_attend(
                    row + o_m[:, None], column + o_n[None, :], q_len, k_len, left, right, p_mask,
                    HAS_LEFT, HAS_RIGHT, HAS_MASK,
                )  # fmt: skip
                b_weights = tl.where(m_pairs, b_weights, 0.0)
            b_dw = tl.dot(b_do, tl.trans(b_v), input_precision="ieee")
            b_ds = b_weights * (b_dw - b_delta[:, None])
            b_dq = tl.dot(b_ds.to(b_k.dtype), b_k, b_dq, input_precision="ieee")

    _store_rows(dq + i_out * D + o_m[:, None] * (heads * D) + o_d[None, :], b_dq * scale, m_rows, m_d)


@triton.jit
def _store_rows(pointers, b_rows, m_rows, m_inner):
    tl.store(pointers, b_rows.to(pointers.dtype.element_ty), mask=m_rows[:, None] & m_inner[None, :])
