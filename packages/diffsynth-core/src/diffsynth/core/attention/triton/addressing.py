"""Where a program of the attention kernels stands, and which blocks it has to visit. Inlined into every kernel.

Letters: `i_*` indices, `o_*` offsets, `b_*` loaded blocks, `p_*` pointers, `m_*` masks. Rows are queries, columns are
keys. `shift` is `k_len - q_len` of the sample: row `i` stands beside column `i + shift`. Blocks `[first, full_first)`
and `[full_last, last)` are visited MASKED, `[full_first, full_last)` without masks, all others not at all.
"""

# ruff: noqa: N803 - constexpr parameters are in capitals, as everywhere in Triton
from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def place(i_program, tiles, heads, REVERSED: tl.constexpr):
    """Tile, head and batch row of a program, the last two 64 bits wide; neighbours share a head, so its keys stay near.

    REVERSED where later tiles have more to do: the longest first keep the device busy to the end.
    """
    i_tile = i_program % tiles
    if REVERSED:
        i_tile = tiles - 1 - i_tile
    i_both = (i_program // tiles).to(tl.int64)
    return i_tile, i_both % heads, i_both // heads


@triton.jit
def locate(cu_tiled, cu_q, cu_k, i_tile, samples, q_len, k_len, BLOCK: tl.constexpr, SAMPLES: tl.constexpr):
    """Tile within its sample, and start and length of the sample's queries and keys; one sample where SAMPLES is 0.

    Each sample of `cu_tiled` is cut into tiles of BLOCK tokens of its own. The grid has `tokens // BLOCK + samples` of
    them, which is never too few and needs no look at the device's offsets; those that are left over get length 0.
    """
    i_sample = i_tile * 0
    q_start = i_sample.to(tl.int64)
    k_start = q_start
    if SAMPLES > 0:
        i = tl.arange(0, SAMPLES)
        starts = tl.load(cu_tiled + i, mask=i < samples, other=0)
        ends = tl.load(cu_tiled + i + 1, mask=i < samples, other=0)
        tiles = (ends - starts + BLOCK - 1) // BLOCK
        i_sample = tl.sum((tl.cumsum(tiles, 0) <= i_tile).to(tl.int32), 0)
        i_tile -= tl.sum(tl.where(i < i_sample, tiles, 0), 0)
        is_one = i_sample < samples
        q_start = tl.load(cu_q + i_sample, mask=is_one, other=0).to(tl.int64)
        k_start = tl.load(cu_k + i_sample, mask=is_one, other=0).to(tl.int64)
        q_len = tl.load(cu_q + i_sample + 1, mask=is_one, other=0) - q_start.to(tl.int32)
        k_len = tl.load(cu_k + i_sample + 1, mask=is_one, other=0) - k_start.to(tl.int32)
    return i_tile, q_start, k_start, q_len, k_len


@triton.jit
def columns_to_visit(
    counts, i_list, row, q_len, k_len, left, right,
    HAS_LEFT: tl.constexpr, HAS_RIGHT: tl.constexpr, HAS_MASK: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Blocks of columns for the tile of rows that begins at `row`: first, full_first, full_last, last."""
    first = row * 0
    full_first = first
    if HAS_MASK:
        full_last, last = tl.load(counts + i_list * 2), tl.load(counts + i_list * 2 + 1)
    else:
        last = first + k_len
        full_last = last
        beside, beside_end = row + (k_len - q_len), tl.minimum(row + BLOCK_M, q_len) + (k_len - q_len)
        if HAS_LEFT:
            first = tl.maximum(beside - left, 0)
            full_first = tl.maximum(beside_end - 1 - left, 0)
        if HAS_RIGHT:
            full_last = tl.minimum(tl.maximum(beside + 1 + right, 0), last)
            last = tl.minimum(tl.maximum(beside_end + right, 0), last)
        first, full_first, full_last, last = _in_blocks(first, full_first, full_last, last, BLOCK_N)
    return first, full_first, full_last, last


@triton.jit
def rows_to_visit(
    counts, i_list, column, q_len, k_len, left, right,
    HAS_LEFT: tl.constexpr, HAS_RIGHT: tl.constexpr, HAS_MASK: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Blocks of rows for the tile of columns that begins at `column`: first, full_first, full_last, last."""
    first = column * 0
    full_first = first
    if HAS_MASK:
        full_last, last = tl.load(counts + i_list * 2), tl.load(counts + i_list * 2 + 1)
    else:
        last = first + q_len
        full_last = last
        beside, beside_end = column - (k_len - q_len), tl.minimum(column + BLOCK_N, k_len) - (k_len - q_len)
        if HAS_RIGHT:
            first = tl.maximum(beside - right, 0)
            full_first = tl.maximum(beside_end - 1 - right, 0)
        if HAS_LEFT:
            full_last = tl.minimum(tl.maximum(beside + 1 + left, 0), last)
            last = tl.minimum(tl.maximum(beside_end + left, 0), last)
        first, full_first, full_last, last = _in_blocks(first, full_first, full_last, last, BLOCK_M)
    return first, full_first, full_last, last


@triton.jit
def _in_blocks(first, full_first, full_last, last, BLOCK: tl.constexpr):
    first = first // BLOCK
    last = tl.maximum((last + BLOCK - 1) // BLOCK, first)
    full_first = tl.minimum(tl.maximum((full_first + BLOCK - 1) // BLOCK, first), last)
    full_last = tl.minimum(tl.maximum(full_last // BLOCK, full_first), last)
    return first, full_first, full_last, last


@triton.jit
def visits(first, full_first, full_last, last, MASKED: tl.constexpr):
    """Range of `block_at` that visits the full blocks, or else those before and after them."""
    if MASKED:
        begin, end = first, last - (full_last - full_first)
    else:
        begin, end = full_first, full_last
    return begin, end


@triton.jit
def block_at(i, blocks, i_list, length, full_first, full_last, MASKED: tl.constexpr, HAS_MASK: tl.constexpr):
    """The block of one visit, looked up in its list of `length` where there is a mask."""
    if MASKED:
        i += tl.where(i < full_first, 0, full_last - full_first)
    if HAS_MASK:
        i = tl.load(blocks + i_list * length + i)
    return i


@triton.jit
def may_attend(
    o_rows, o_columns, q_len, k_len, left, right, p_mask,
    HAS_LEFT: tl.constexpr, HAS_RIGHT: tl.constexpr, HAS_MASK: tl.constexpr,
):  # fmt: skip
    """Which pairs positions and mask allow; the offsets broadcast against each other, one along each axis."""
    m_pairs = (o_rows < q_len) & (o_columns < k_len)
    if HAS_LEFT:
        m_pairs &= o_columns >= o_rows + (k_len - q_len - left)
    if HAS_RIGHT:
        m_pairs &= o_columns <= o_rows + (k_len - q_len + right)
    if HAS_MASK:
        m_pairs &= tl.load(p_mask, mask=m_pairs, other=0) != 0
    return m_pairs


@triton.jit
def load_rows(pointers, m_rows, m_inner, MASK_ROWS: tl.constexpr, MASK_INNER: tl.constexpr):
    """A block whose first axis may end early (the last tokens) and whose second may be padded (the head dim)."""
    if MASK_ROWS and MASK_INNER:
        b_rows = tl.load(pointers, mask=m_rows[:, None] & m_inner[None, :], other=0)
    elif MASK_ROWS:
        b_rows = tl.load(pointers, mask=m_rows[:, None], other=0)
    elif MASK_INNER:
        b_rows = tl.load(pointers, mask=m_inner[None, :], other=0)
    else:
        b_rows = tl.load(pointers)
    return b_rows
