"""What one attention call is, and what a backend must offer."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from jaxtyping import Bool, Float
from torch import Tensor


@dataclass(frozen=True)
class AttentionCall:
    """One checked call: shapes, dtypes and devices fit together.

    Args:
        q: queries.
        k: keys; `n` is a multiple of `n_kv`, and query head `i` reads key head `i // (n // n_kv)`.
        v: values.
        mask: True = may attend; four axes, each of the call's size or 1. A query that may attend nothing gives zeros.
        causal: query `i` may attend key `j` only if `j <= i + (k_len - q_len)`: the last query sees every key.
        scale: factor on the scores.
    """

    q: Float[Tensor, "b q n d"]
    k: Float[Tensor, "b k n_kv d"]
    v: Float[Tensor, "b k n_kv d_v"]
    mask: Bool[Tensor, "#b #n #q #k"] | None
    causal: bool
    scale: float

    @property
    def q_per_kv(self) -> int:
        """How many query heads share a key head; 1 unless grouped."""
        return self.q.shape[2] // self.k.shape[2]

    def allowed(self) -> Bool[Tensor, "#b #n #q #k"] | None:
        """`mask` and `causal` as one mask; None when everything may attend everything."""
        if not self.causal:
            return self.mask
        q_len, k_len = self.q.shape[1], self.k.shape[1]
        causal = torch.ones(q_len, k_len, dtype=torch.bool, device=self.q.device).tril(k_len - q_len)
        return causal[None, None] if self.mask is None else causal & self.mask


class AttentionBackend(Protocol):
    """An implementation of attention."""

    def refuses(self, call: AttentionCall) -> str | None:
        """Why this call cannot be served exactly as described, or None if it can."""

    def __call__(self, call: AttentionCall) -> Float[Tensor, "b q n d_v"]:
        """The result, in the dtype of `call.q`; only asked for calls that were not refused."""


def check(q: Tensor, k: Tensor, v: Tensor, *, mask: Tensor | None, causal: bool, scale: float | None) -> AttentionCall:
    """An `AttentionCall`, with the default scale `d ** -0.5` filled in.

    Raises:
        ValueError: shapes, dtypes or devices that no backend could serve.
        TypeError: a mask that is not bool.
    """
    shapes = f"q {tuple(q.shape)}, k {tuple(k.shape)}, v {tuple(v.shape)}"
    if not q.ndim == k.ndim == v.ndim == 4:
        raise ValueError(f"attention takes 'b s n d' tensors of four axes, got {shapes}")
    if k.shape[:3] != v.shape[:3] or q.shape[0] != k.shape[0] or q.shape[3] != k.shape[3]:
        raise ValueError(f"attention: {shapes} do not fit 'b q n d', 'b k n_kv d', 'b k n_kv d_v'")
    if q.shape[2] % k.shape[2]:
        raise ValueError(f"attention: {q.shape[2]} query heads are not a multiple of {k.shape[2]} key heads")
    if not q.dtype == k.dtype == v.dtype or not q.device == k.device == v.device:
        raise ValueError(
            f"attention: q, k and v differ: {q.dtype}, {k.dtype}, {v.dtype} on {q.device}, {k.device}, {v.device}; "
            "cast or move them first"
        )
    if mask is not None:
        _check_mask(mask, (q.shape[0], q.shape[2], q.shape[1], k.shape[1]))
    return AttentionCall(q, k, v, mask, causal, q.shape[-1] ** -0.5 if scale is None else scale)


def _check_mask(mask: Tensor, full: tuple[int, int, int, int]) -> None:
    if mask.dtype != torch.bool:
        raise TypeError(f"attention mask is {mask.dtype}; expected bool, True = may attend")
    fits = mask.ndim == 4 and all(size in (1, wanted) for size, wanted in zip(mask.shape, full, strict=True))
    if not fits:
        raise ValueError(f"attention mask of shape {tuple(mask.shape)} does not broadcast to 'b n q k' = {full}")
