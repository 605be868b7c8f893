"""Which blocks of a mask a kernel has to visit: found once per mask, so that empty blocks cost nothing.

A block is full (every pair may attend: its mask is not even loaded), partial, or empty (skipped).
"""

# ruff: noqa: N803 - constexpr parameters are in capitals, as everywhere in Triton
from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.library import wrap_triton
from torch.nn.functional import pad
from torch.utils.weak import WeakTensorKeyDictionary

from diffsynth.core.attention.triton.addressing import may_attend

_known: WeakTensorKeyDictionary = WeakTensorKeyDictionary()


@dataclass(frozen=True)
class BlockLists:
    """For each tile, the blocks that it visits: the full ones first, then the partial ones.

    Args:
        blocks: int32, `b n tiles blocks`; `b` and `n` are 1 where the mask's are.
        counts: int32, `b n tiles 2`: how many are full, and how many are full or partial.
    """

    blocks: Tensor
    counts: Tensor

    @property
    def strides(self) -> tuple[int, int, int]:
        """Of batch, head and tile, counted in lists; 0 where one list serves all."""
        b, n, tiles, _ = self.counts.shape
        return (n * tiles if b > 1 else 0), (tiles if n > 1 else 0), (1 if tiles > 1 else 0)


def block_lists(
    mask: Tensor, lengths: tuple[int, int], limits: tuple[int, int], blocks: tuple[int, int], *, by_keys: bool
) -> BlockLists:
    """Lists for a mask together with a window.

    They are kept as long as the mask is, except while compiling, where they become a part of the graph, and for
    inference tensors, which do not say when they are changed.

    Args:
        mask: bool, `b n q k`, each of the call's size or 1.
        lengths: of queries and keys.
        limits: (left, right) of the window, -1 where it has no limit.
        blocks: BLOCK_M and BLOCK_N.
        by_keys: a list of query blocks for each tile of keys, instead of the other way round.
    """
    if type(mask) is not Tensor or mask.is_inference():
        return _lists(mask, lengths, limits, blocks, by_keys)
    kept = _known.setdefault(mask, {})
    key = (mask._version, lengths, limits, blocks, by_keys)
    if key not in kept:
        for stale in [other for other in kept if other[0] != mask._version]:
            del kept[stale]
        kept[key] = _lists(mask, lengths, limits, blocks, by_keys)
    return kept[key]


def aligned_rows(mask: Tensor) -> Tensor:
    """The mask, axes that it is expanded along cut to 1; a copy if its rows do not begin at multiples of 16 bytes.

    Triton loads such rows many bytes at a time. Loads of single bytes need so many registers that kernels spill.
    """
    for axis in (0, 1, 2):
        if mask.stride(axis) == 0:
            mask = mask.narrow(axis, 0, 1)
    *leading, k_len = mask.shape
    strides = [stride for size, stride in zip(leading, mask.stride(), strict=False) if size > 1]
    if k_len == 1 or (mask.stride(3) == 1 and all(stride % 16 == 0 for stride in strides)):
        return mask
    return pad(mask, (0, -k_len % 16)).contiguous()


def launchable(kernel: Any) -> Any:
    """The kernel for `[grid](...)` inside a `triton_op`; under TRITON_INTERPRET=1 there is nothing to trace."""
    return wrap_triton(kernel) if isinstance(kernel, triton.JITFunction) else kernel


def _lists(
    mask: Tensor, lengths: tuple[int, int], limits: tuple[int, int], blocks: tuple[int, int], by_keys: bool
) -> BlockLists:
    mask = aligned_rows(mask)
    b, n, rows, _ = mask.shape
    (q_len, k_len), (left, right), (block_m, block_n) = lengths, limits, blocks
    if rows == 1 and limits == (-1, -1) and not by_keys:
        q_len = 1  # key padding: all tiles of queries share one list
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
    """2 where a whole block may attend, 1 where some pair of it may, else 0.

    Columns past the last key may not, so a block that holds some is partial; rows past the last query do not count.
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
