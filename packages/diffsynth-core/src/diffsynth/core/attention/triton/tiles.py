"""Lists of the blocks of a mask that a kernel visits, computed once per mask.

A block is full (every pair may attend, so its mask is not loaded), partial, or empty (skipped).
"""

# ruff: noqa: N803 - constexpr parameters are in capitals, as everywhere in Triton
from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.nn.functional import pad
from torch.utils.weak import WeakTensorKeyDictionary

from diffsynth.core.attention.triton.addressing import may_attend
from diffsynth.nn.triton.launch import launchable

_cache: WeakTensorKeyDictionary = WeakTensorKeyDictionary()
"""Mask -> (version, lengths, limits, blocks, by_keys) -> lists."""


@dataclass(frozen=True)
class BlockLists:
    """Blocks to visit for each tile: the full ones first, then the partial ones.

    Args:
        blocks: block indices, int32 `b n tiles blocks`; `b` and `n` are 1 if they are 1 in the mask.
        counts: int32 `b n tiles 2`: the number of full blocks, and of full and partial blocks.
    """

    blocks: Tensor
    counts: Tensor

    @property
    def strides(self) -> tuple[int, int, int]:
        """Tuple of strides of batch, head and tile, counted in block lists (not elements); 0 for an axis of size 1."""
        b, n, tiles, _ = self.counts.shape
        return (n * tiles if b > 1 else 0), (tiles if n > 1 else 0), (1 if tiles > 1 else 0)


def block_lists(
    mask: Tensor, lengths: tuple[int, int], limits: tuple[int, int], blocks: tuple[int, int], *, by_keys: bool
) -> BlockLists:
    """Return the `BlockLists` of a mask and window: for each tile of queries the key blocks to visit, full ones first,
    then partial ones (or query blocks for each tile of keys).

    They are cached as long as the mask lives. They are not cached while compiling, where they become part of the graph,
    and for inference tensors, which have no version counter to detect changes in place.

    Args:
        mask: bool `b n q k`, each axis of the call's size or 1.
        lengths: number of queries and of keys.
        limits: (left, right) of the window; -1 is no limit.
        blocks: BLOCK_M and BLOCK_N.
        by_keys: list query blocks for each tile of keys, instead of key blocks for each tile of queries.
    """
    if type(mask) is not Tensor or mask.is_inference():
        return _find_blocks(mask, lengths, limits, blocks, by_keys)
    cached = _cache.setdefault(mask, {})
    key = (mask._version, lengths, limits, blocks, by_keys)
    if key not in cached:
        for stale in [other for other in cached if other[0] != mask._version]:
            del cached[stale]
        cached[key] = _find_blocks(mask, lengths, limits, blocks, by_keys)
    return cached[key]


def aligned_rows(mask: Tensor) -> Tensor:
    """Return the bool `mask` with expanded batch, head and query axes cut to size 1; it is a copy with padded rows
    unless rows are dense and begin at multiples of 16 bytes, or have one element.

    Triton vectorises loads of such rows. Loads of single bytes need so many registers that the kernels spill.
    """
    for axis in (0, 1, 2):
        if mask.stride(axis) == 0:
            mask = mask.narrow(axis, 0, 1)
    *leading, k_len = mask.shape
    strides = [stride for size, stride in zip(leading, mask.stride(), strict=False) if size > 1]
    if k_len == 1 or (mask.stride(3) == 1 and all(stride % 16 == 0 for stride in strides)):
        return mask
    return pad(mask, (0, -k_len % 16)).contiguous()


def _find_blocks(
    mask: Tensor, lengths: tuple[int, int], limits: tuple[int, int], blocks: tuple[int, int], by_keys: bool
) -> BlockLists:
    mask = aligned_rows(mask)
    b, n, rows, _ = mask.shape
    (q_len, k_len), (left, right), (block_m, block_n) = lengths, limits, blocks
    if rows == 1 and limits == (-1, -1) and not by_keys:
        q_len = 1  # a padding mask of keys: all tiles of queries share one list
    q_tiles, k_tiles = triton.cdiv(q_len, block_m), triton.cdiv(k_len, block_n)
    state = torch.empty(b, n, q_tiles, k_tiles, dtype=torch.int8, device=mask.device)
    strides = [0 if size == 1 else stride for size, stride in zip(mask.shape, mask.stride(), strict=True)]
    launchable(mask_tiles_kernel)[(b * n * q_tiles * k_tiles,)](
        mask, state, *strides, n, q_len, k_len, left, right,
        HAS_LEFT=left >= 0, HAS_RIGHT=right >= 0, BLOCK_M=block_m, BLOCK_N=block_n,
    )  # fmt: skip
    if by_keys:
        state = state.transpose(-1, -2)
    order = state.argsort(dim=-1, descending=True, stable=True)
    counts = torch.stack([(state == 2).sum(-1), (state > 0).sum(-1)], dim=-1)
    return BlockLists(order.to(torch.int32).contiguous(), counts.to(torch.int32))


@triton.jit(do_not_specialize=["q_len", "k_len", "left", "right"])
def mask_tiles_kernel(
    mask, state, stride_mb, stride_mn, stride_mq, stride_mk, heads, q_len, k_len, left, right,
    HAS_LEFT: tl.constexpr, HAS_RIGHT: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Store the state of one BLOCK_M x BLOCK_N block of the mask and window in int8 `state`: 2 if all pairs may attend,
    1 if some, 0 if none.

    Columns past the last key are not allowed, so a block with such columns is partial; rows past the last query are
    ignored.
    """
    i_program, q_tiles, k_tiles = tl.program_id(0), tl.cdiv(q_len, BLOCK_M), tl.cdiv(k_len, BLOCK_N)
    column, row = (i_program % k_tiles) * BLOCK_N, (i_program // k_tiles % q_tiles) * BLOCK_M
    i_both = (i_program // k_tiles // q_tiles).to(tl.int64)
    o_rows, o_columns = row + tl.arange(0, BLOCK_M)[:, None], column + tl.arange(0, BLOCK_N)[None, :]
    p_mask = mask + i_both // heads * stride_mb + i_both % heads * stride_mn
    p_mask += o_rows.to(tl.int64) * stride_mq + o_columns.to(tl.int64) * stride_mk
    m_pairs = may_attend(o_rows, o_columns, q_len, k_len, left, right, p_mask, HAS_LEFT, HAS_RIGHT, True)
    some = tl.max(tl.max(m_pairs.to(tl.int32), 1), 0)
    every = tl.min(tl.min((m_pairs | (o_rows >= q_len)).to(tl.int32), 1), 0)
    tl.store(state + i_program, (some + some * every).to(tl.int8))
