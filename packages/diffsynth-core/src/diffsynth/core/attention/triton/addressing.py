"""Device functions that give a program of the attention kernels its tile and the blocks that it visits.

They are inlined into every kernel. Names: `i_*` indices, `o_*` offsets, `b_*` loaded blocks, `p_*` pointers, `m_*`
masks. Rows are queries, columns are keys. Row `i` of a sample is aligned with column `i + k_len - q_len`. Blocks
`[first, full_first)` and `[full_last, last)` are visited with masks (MASKED), `[full_first, full_last)` without masks,
all others not at all.
"""

# ruff: noqa: N803 - constexpr parameters are in capitals, as everywhere in Triton
from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def program_indices(i_program, tiles, heads, REVERSED: tl.constexpr):
    """Return (index of the tile, index of the head, index of the batch row) that a kernel program works on; the latter
    two are int64.

    Neighbouring programs share a head, so its keys stay in the cache. REVERSED starts with the last tiles, for kernels
    whose later tiles have more work: launching the longest programs first keeps the device busy to the end.
    """
    i_tile = i_program % tiles
    if REVERSED:
        i_tile = tiles - 1 - i_tile
    i_both = (i_program // tiles).to(tl.int64)
    return i_tile, i_both % heads, i_both // heads


@triton.jit
def locate_sample(cu_tiled, cu_q, cu_k, i_tile, samples, q_len, k_len, BLOCK: tl.constexpr, SAMPLES: tl.constexpr):
    """Return five integers: a tile's index within its packed sample, the sample's first query, its first key, its
    number of queries and its number of keys (both 0 for a surplus tile).

    With SAMPLES 0 there is one sample. Each sample of `cu_tiled` is divided into tiles of BLOCK tokens. The grid has
    `tokens // BLOCK + samples` tiles, an upper bound that is known without reading the offsets from the device; surplus
    tiles get length 0.
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
    """Return four ints (first, full_first, full_last, last): the BLOCK_M queries at `row` visit key blocks [first,
    last), and mask those outside [full_first, full_last); with HAS_MASK, they are positions in the list of blocks
    `i_list`, not blocks.
    """
    first = row * 0
    full_first = first
    if HAS_MASK:
        full_last, last = tl.load(counts + i_list * 2), tl.load(counts + i_list * 2 + 1)
    else:
        last = first + k_len
        full_last = last
        begin, end = row + (k_len - q_len), tl.minimum(row + BLOCK_M, q_len) + (k_len - q_len)  # aligned columns
        if HAS_LEFT:
            first = tl.maximum(begin - left, 0)
            full_first = tl.maximum(end - 1 - left, 0)
        if HAS_RIGHT:
            full_last = tl.minimum(tl.maximum(begin + 1 + right, 0), last)
            last = tl.minimum(tl.maximum(end + right, 0), last)
        first, full_first, full_last, last = _in_blocks(first, full_first, full_last, last, BLOCK_N)
    return first, full_first, full_last, last


@triton.jit
def rows_to_visit(
    counts, i_list, column, q_len, k_len, left, right,
    HAS_LEFT: tl.constexpr, HAS_RIGHT: tl.constexpr, HAS_MASK: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Return four ints (first, full_first, full_last, last): the BLOCK_N keys at `column` visit query blocks [first,
    last), and mask those outside [full_first, full_last); with HAS_MASK, they are positions in the list of blocks
    `i_list`, not blocks.
    """
    first = column * 0
    full_first = first
    if HAS_MASK:
        full_last, last = tl.load(counts + i_list * 2), tl.load(counts + i_list * 2 + 1)
    else:
        last = first + q_len
        full_last = last
        begin, end = column - (k_len - q_len), tl.minimum(column + BLOCK_N, k_len) - (k_len - q_len)  # aligned rows
        if HAS_RIGHT:
            first = tl.maximum(begin - right, 0)
            full_first = tl.maximum(end - 1 - right, 0)
        if HAS_LEFT:
            full_last = tl.minimum(tl.maximum(begin + 1 + left, 0), last)
            last = tl.minimum(tl.maximum(end + left, 0), last)
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
def visit_range(first, full_first, full_last, last, MASKED: tl.constexpr):
    """Return (begin, end), end exclusive, of the visit numbers that `block_at` maps to blocks: those that need a mask
    if MASKED, else the full ones.
    """
    if MASKED:
        begin, end = first, last - (full_last - full_first)
    else:
        begin, end = full_first, full_last
    return begin, end


@triton.jit
def block_at(i, blocks, i_list, length, full_first, full_last, MASKED: tl.constexpr, HAS_MASK: tl.constexpr):
    """Return the index of the block that visit number `i` loads; with HAS_MASK, it is read from the tile's list in
    `blocks`, which has room for `length` blocks.
    """
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
    """Return a bool block, True where a row (query) may attend a column (key) by lengths, window and, with HAS_MASK,
    mask; the offsets `o_rows` and `o_columns` broadcast against each other.
    """
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
    """Return the block of values at `pointers`; with MASK_ROWS it is 0 where `m_rows` is False (past the last token),
    with MASK_INNER where `m_inner` is (padding of the head dim).
    """
    if MASK_ROWS and MASK_INNER:
        b_rows = tl.load(pointers, mask=m_rows[:, None] & m_inner[None, :], other=0)
    elif MASK_ROWS:
        b_rows = tl.load(pointers, mask=m_rows[:, None], other=0)
    elif MASK_INNER:
        b_rows = tl.load(pointers, mask=m_inner[None, :], other=0)
    else:
        b_rows = tl.load(pointers)
    return b_rows
