"""What one attention call is, and what a backend must offer. `checking.check` makes calls from what users give."""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from typing import Protocol

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor


@dataclass(frozen=True)
class AttentionCall:
    """One checked call: shapes, dtypes and devices fit together. What it says is true or the backend refuses.

    "Aligned": with `i' = i + k_len - q_len`, query `i` stands beside key `i'`, so the last query beside the last key.
    `causal` and `window` are aligned; with `cu_seqlens`, within each sample.

    Args:
        q: queries.
        k: keys; `n` is a multiple of `n_kv`, and query head `i` reads key head `i // (n // n_kv)`.
        v: values.
        mask: True = may attend; four axes, each of the call's size or 1. A query that may attend nothing gives zeros.
        causal: query `i` may attend key `j` only if `j <= i'`.
        scale: factor on the scores.
        window: (left, right): only if `i' - left <= j <= i' + right`; each >= 0, or -1 where that side has no limit.
            Never (-1, -1), which is None; with `causal`, right is 0.
        cu_seqlens: int32 offsets of the samples packed along the tokens of a batch of 1, for queries and for keys:
            from 0 to their number of tokens, never falling. Tokens attend within their own sample only, and a sample
            may be empty. Both are on the device of `q`.
        score_bias: added to the scaled scores, in their place; the dtype of `q` or fp32. A query whose scores are all
            -inf gives zeros.
        offsets: the values of `cu_seqlens` where they are known without asking the device for them.
    """

    q: Float[Tensor, "b q n d"]
    k: Float[Tensor, "b k n_kv d"]
    v: Float[Tensor, "b k n_kv d_v"]
    mask: Bool[Tensor, "#b #n #q #k"] | None
    causal: bool
    scale: float
    window: tuple[int, int] | None = None
    cu_seqlens: tuple[Int[Tensor, "samples_plus_1"], Int[Tensor, "samples_plus_1"]] | None = None
    score_bias: Float[Tensor, "#b #n #q #k"] | None = None
    offsets: tuple[tuple[int, ...], tuple[int, ...]] | None = None

    @property
    def q_len(self) -> int:
        """Tokens of queries, all samples together."""
        return self.q.shape[1]

    @property
    def k_len(self) -> int:
        """Tokens of keys, all samples together."""
        return self.k.shape[1]

    @property
    def q_per_kv(self) -> int:
        """How many query heads share a key head; 1 unless grouped."""
        return self.q.shape[2] // self.k.shape[2]

    @property
    def longest(self) -> tuple[int, int]:
        """Tokens of the longest sample, queries and keys; where only the device knows, all tokens: an upper bound."""
        if self.offsets is None:
            return self.q_len, self.k_len
        q_len, k_len = (max(after - before for before, after in itertools.pairwise(x)) for x in self.offsets)
        return q_len, k_len

    @property
    def needs_grad(self) -> bool:
        """Whether a backward pass may follow."""
        bias = self.score_bias
        tensors = (self.q, self.k, self.v) if bias is None else (self.q, self.k, self.v, bias)
        return torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors)

    @property
    def limits(self) -> tuple[int, int]:
        """`window` and `causal` as one window, (-1, -1) where neither is given."""
        left, right = self.window or (-1, -1)
        return (left, 0) if self.causal else (left, right)

    @property
    def is_plain(self) -> bool:
        """Whether every query may attend every key of its batch row, and no score is changed."""
        return self.limits == (-1, -1) and self.mask is None and self.cu_seqlens is None and self.score_bias is None

    def allowed(self) -> Bool[Tensor, "#b #n #q #k"] | None:
        """`mask`, `causal`, `window` and `cu_seqlens` as one mask; None when everything may attend everything."""
        if self.limits == (-1, -1) and self.cu_seqlens is None:
            return self.mask
        by_place = self._allowed_by_place()[None, None]
        return by_place if self.mask is None else by_place & self.mask

    def describe(self) -> str:
        """Shapes, dtype and device, and what else is asked for; for messages."""
        parts = [f"q {tuple(self.q.shape)}, k {tuple(self.k.shape)}, v {tuple(self.v.shape)}"]
        parts.append(f"{str(self.q.dtype).removeprefix('torch.')} on {self.q.device}")
        if self.mask is not None:
            parts.append(f"mask {tuple(self.mask.shape)}")
        if self.causal:
            parts.append("causal")
        if self.window is not None:
            parts.append(f"window {self.window}")
        if self.cu_seqlens is not None:
            parts.append(f"{len(self.cu_seqlens[0]) - 1} packed samples")
        if self.score_bias is not None:
            parts.append(f"score_bias {tuple(self.score_bias.shape)}")
        return ", ".join(parts)

    def _allowed_by_place(self) -> Bool[Tensor, "q k"]:
        i = torch.arange(self.q_len, dtype=torch.int32, device=self.q.device)
        j = torch.arange(self.k_len, dtype=torch.int32, device=self.q.device)
        allowed = None
        shift: int | Tensor = self.k_len - self.q_len
        if self.cu_seqlens is not None:
            (sample_of_q, cu_q), (sample_of_k, cu_k) = (
                (torch.bucketize(at, cu[1:], right=True, out_int32=True), cu)
                for at, cu in zip((i, j), self.cu_seqlens, strict=True)
            )
            allowed = sample_of_q[:, None] == sample_of_k[None, :]
            shift = (cu_k[1:] - cu_q[1:])[sample_of_q]  # ends of a sample stand beside each other
        left, right = self.limits
        beside = (i + shift)[:, None]
        if left >= 0:
            near = j >= beside - left
            allowed = near if allowed is None else allowed & near
        if right >= 0:
            near = j <= beside + right
            allowed = near if allowed is None else allowed & near
        assert allowed is not None
        return allowed


class AttentionBackend(Protocol):
    """An implementation of attention.

    It may also have `avoids(call) -> str | None`: why the automatic choice should first look for another backend,
    although this one can serve the call. Reasons are logged once each, so they name no sizes that change per call.

    And `workspace(call, device_type) -> int`: bytes that it takes there beside inputs and output. Plans ask it with
    tensors on meta; `core.attention.workspace` has the usual ones.
    """

    def refuses(self, call: AttentionCall) -> str | None:
        """Why this call cannot be served exactly as described, or None if it can."""

    def __call__(self, call: AttentionCall) -> Float[Tensor, "b q n d_v"]:
        """The result, in the dtype of `call.q`; only asked for calls that were not refused."""
