"""Splitting of a call into smaller ones, for backends whose kernels support neither packed samples nor windows."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from diffsynth.core.attention.call import AttentionCall

CHUNK = 256
"""Fewest queries of a chunk of a windowed call: below, launching kernels takes longer than running them."""

QueryChunk = tuple[int, AttentionCall | None]
"""(number of queries, their call); None if none of them has an allowed key, so that their output is 0."""


def attend_in_chunks(
    query_chunks: Iterator[QueryChunk], call: AttentionCall, serve: Callable[[AttentionCall], Tensor]
) -> Float[Tensor, "b q n d_v"]:
    """Return the attention output `b q n d_v` of `call`: the outputs of `serve` for its chunks (zeros for a chunk
    without keys), concatenated along the queries.
    """
    b, _, n, _ = call.q.shape
    outs = [
        call.q.new_zeros(b, size, n, call.v.shape[-1]) if chunk is None else serve(chunk)
        for size, chunk in query_chunks
    ]
    return outs[0] if len(outs) == 1 else torch.cat(outs, dim=1)


def by_sample(call: AttentionCall) -> Iterator[QueryChunk]:
    """Yield (number of queries, the sample's `AttentionCall`, or None if it has no keys) for each packed sample in
    order; samples without queries are skipped.

    `call.offsets` must be known.
    """
    assert call.offsets is not None
    for q_range, k_range in zip(*map(itertools.pairwise, call.offsets), strict=True):
        size = q_range[1] - q_range[0]
        if size:
            empty = k_range[0] == k_range[1]
            yield size, None if empty else _slice(call, q_range, k_range, cu_seqlens=None, offsets=None)


def chunk_size(call: AttentionCall) -> int:
    """Return the number of queries per chunk of `by_window`, an int: the window's width in tokens, or 1024 if a side
    has no limit, but at least 256.
    """
    left, right = call.limits
    return max(CHUNK, left + right + 1 if left >= 0 and right >= 0 else 4 * CHUNK)


def by_window(call: AttentionCall) -> Iterator[QueryChunk]:
    """Yield (number of queries, `AttentionCall` of these queries and the keys in their windows, or None if there are no
    such keys) for each chunk of consecutive queries; all but the last have `chunk_size(call)` queries.
    """
    left, right = call.limits
    size = chunk_size(call)
    shift = call.k_len - call.q_len
    for start in range(0, call.q_len, size):
        stop = min(start + size, call.q_len)
        first = max(0, start + shift - left) if left >= 0 else 0
        last = min(call.k_len, stop + shift + right) if right >= 0 else call.k_len
        if first >= last:
            yield stop - start, None
            continue
        # Within the chunk its last query is aligned with its last key, so the window moves by the difference.
        moved = stop + shift - last
        window = (left - moved if left >= 0 else -1, right + moved if right >= 0 else -1)
        changes = {"causal": False, "window": None if window == (-1, -1) else window}
        yield stop - start, _slice(call, (start, stop), (first, last), **changes)


def _slice(call: AttentionCall, q_range: tuple[int, int], k_range: tuple[int, int], **changes: Any) -> AttentionCall:
    q_slice, k_slice = slice(*q_range), slice(*k_range)

    def sliced(tensor: Tensor | None) -> Tensor | None:
        if tensor is None:
            return None
        rows = tensor if tensor.shape[2] == 1 else tensor[:, :, q_slice]
        return rows if rows.shape[3] == 1 else rows[..., k_slice]

    return replace(
        call,
        q=call.q[:, q_slice],
        k=call.k[:, k_slice],
        v=call.v[:, k_slice],
        mask=sliced(call.mask),
        score_bias=sliced(call.score_bias),
        **changes,
    )
