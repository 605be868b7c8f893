"""The description of one attention call, its construction from user arguments, and the interface of a backend."""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from typing import Protocol

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

CuSeqlens = Tensor | tuple[Tensor, Tensor]
"""Offsets of packed samples: one tensor for queries and keys, or a pair (queries, keys)."""


@dataclass(frozen=True)
class AttentionCall:
    """The checked arguments of one attention call. A backend honours all of them or refuses the call.

    Positions are aligned at the end of the sequences: query `i` has the position of key `i' = i + k_len - q_len`, so
    the last query has the position of the last key. `causal` and `window` use these positions; with `cu_seqlens`, they
    are counted within each sample.

    Args:
        q: queries.
        k: keys; `n` is a multiple of `n_kv`, and query head `i` reads key head `i // (n // n_kv)`.
        v: values.
        mask: True = may attend; four axes, each of the call's size or 1. A query without an allowed key gives zeros.
        causal: query `i` may attend key `j` only if `j <= i'`.
        scale: factor on the scores.
        window: (left, right): query `i` may attend key `j` only if `i' - left <= j <= i' + right`; each is >= 0, or -1
            for no limit on that side. Never (-1, -1), which is None; with `causal`, right is 0.
        cu_seqlens: int32 offsets, for queries and for keys, of samples packed along the token axis of a batch of 1:
            ascending from 0 to the number of tokens. Tokens attend within their own sample only; a sample may be
            empty. Both tensors are on the device of `q`.
        score_bias: added to the scaled scores; the dtype of `q` or fp32. A query whose scores are all -inf gives zeros.
        offsets: the values of `cu_seqlens`, if they are known without a copy from the device.
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
        """Number of query tokens, over all packed samples."""
        return self.q.shape[1]

    @property
    def k_len(self) -> int:
        """Number of key tokens, over all packed samples."""
        return self.k.shape[1]

    @property
    def q_per_kv(self) -> int:
        """Number of query heads per key head; 1 without grouped-query attention."""
        return self.q.shape[2] // self.k.shape[2]

    @property
    def longest(self) -> tuple[int, int]:
        """Tuple (queries, keys): the most tokens of each in any packed sample; `q_len` and `k_len` if `offsets` is
        None.
        """
        if self.offsets is None:
            return self.q_len, self.k_len
        q_len, k_len = (max(after - before for before, after in itertools.pairwise(x)) for x in self.offsets)
        return q_len, k_len

    @property
    def needs_grad(self) -> bool:
        """Whether autograd records this call: gradients are enabled, and `q`, `k`, `v` or `score_bias` requires one."""
        bias = self.score_bias
        tensors = (self.q, self.k, self.v) if bias is None else (self.q, self.k, self.v, bias)
        return torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors)

    @property
    def limits(self) -> tuple[int, int]:
        """Tuple (left, right), `window` combined with `causal` (right is 0), in tokens; -1 is no limit on that side."""
        left, right = self.window or (-1, -1)
        return (left, 0) if self.causal else (left, right)

    @property
    def is_plain(self) -> bool:
        """Whether the call has no mask, causality, window, packed samples or score bias: all pairs may attend."""
        return self.limits == (-1, -1) and self.mask is None and self.cu_seqlens is None and self.score_bias is None

    def allowed(self) -> Bool[Tensor, "#b #n #q #k"] | None:
        """Return a bool tensor that broadcasts to `b n q k` (True = may attend) and combines `mask`, `causal`, `window`
        and `cu_seqlens`; None if the call has none of these.
        """
        if self.limits == (-1, -1) and self.cu_seqlens is None:
            return self.mask
        by_position = self._allowed_by_position()[None, None]
        return by_position if self.mask is None else by_position & self.mask

    def describe(self) -> str:
        """Return a text for messages with shapes, dtype, device and options: "q (1, 8, 2, 64), k ..., float16 on cpu,
        causal".
        """
        parts = [_shapes(self.q, self.k, self.v)]
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

    def _allowed_by_position(self) -> Bool[Tensor, "q k"]:
        i = torch.arange(self.q_len, dtype=torch.int32, device=self.q.device)
        j = torch.arange(self.k_len, dtype=torch.int32, device=self.q.device)
        allowed = None
        shift: int | Tensor = self.k_len - self.q_len
        if self.cu_seqlens is not None:
            (sample_of_q, cu_q), (sample_of_k, cu_k) = (
                (torch.bucketize(token, cu[1:], right=True, out_int32=True), cu)
                for token, cu in zip((i, j), self.cu_seqlens, strict=True)
            )
            allowed = sample_of_q[:, None] == sample_of_k[None, :]
            shift = (cu_k[1:] - cu_q[1:])[sample_of_q]  # the ends of each sample are aligned
        left, right = self.limits
        position = (i + shift)[:, None]
        if left >= 0:
            within = j >= position - left
            allowed = within if allowed is None else allowed & within
        if right >= 0:
            within = j <= position + right
            allowed = within if allowed is None else allowed & within
        assert allowed is not None
        return allowed


class AttentionBackend(Protocol):
    """An implementation of attention.

    Two methods are optional:

    * `avoids(call) -> str | None`: why `auto` should prefer another backend, although this one can serve the call.
      Reasons are logged once each, so they must not contain sizes that change per call.
    * `workspace(call, device_type) -> int`: bytes that the backend allocates on the device beside inputs and output.
      Memory planning calls it with tensors on the meta device; `core.attention.meta` has estimates for common kernels.
    """

    def refuses(self, call: AttentionCall) -> str | None:
        """Return a text, the reason why the backend cannot serve this call exactly as described, or None if it can."""

    def __call__(self, call: AttentionCall) -> Float[Tensor, "b q n d_v"]:
        """Return the attention output in the dtype of `call.q`; called only if `refuses(call)` is None."""


def checked_call(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    mask: Tensor | None = None,
    causal: bool = False,
    scale: float | None = None,
    window: tuple[int, int] | None = None,
    cu_seqlens: CuSeqlens | None = None,
    score_bias: Tensor | None = None,
) -> AttentionCall:
    """Check the arguments of `attention()`, raise if no backend could serve them, and return them as an
    `AttentionCall`.

    `scale` defaults to `d ** -0.5`. The values of `cu_seqlens` are checked if they are on the CPU, and then copied to
    the device of `q`. On an accelerator only dtype and shape are checked, because reading the values would synchronise
    with the device.

    Raises:
        ValueError: shapes, dtypes, devices, windows or offsets that no backend could serve.
        TypeError: a mask that is not bool, a bias that is not floating point, offsets that are not int32.
    """
    # First the axes and sizes of q, k and v: all later checks, and their messages, rely on four axes that fit.
    _check_tensors(q, k, v)
    full = (q.shape[0], q.shape[2], q.shape[1], k.shape[1])
    if mask is not None:
        if mask.dtype != torch.bool:
            raise TypeError(
                f"attention mask is {mask.dtype}; expected bool, True = may attend. "
                "Pass values that are added to the scores as score_bias="
            )
        _check_broadcasts("mask", mask, full, q)
    if score_bias is not None:
        if score_bias.dtype not in (q.dtype, torch.float32):
            raise TypeError(f"attention score_bias is {score_bias.dtype}; expected {q.dtype}, as q, or torch.float32")
        _check_broadcasts("score_bias", score_bias, full, q)
    packed = offsets = None
    if cu_seqlens is not None:
        packed, offsets = _checked_cu_seqlens(cu_seqlens, q, k)
    return AttentionCall(
        q,
        k,
        v,
        mask,
        causal,
        q.shape[-1] ** -0.5 if scale is None else scale,
        window=_checked_window(window, causal),
        cu_seqlens=packed,
        score_bias=score_bias,
        offsets=offsets,
    )


def _check_tensors(q: Tensor, k: Tensor, v: Tensor) -> None:
    if not q.ndim == k.ndim == v.ndim == 4:
        raise ValueError(f"attention takes 'b s n d' tensors of four axes, got {_shapes(q, k, v)}")
    if k.shape[:3] != v.shape[:3] or q.shape[0] != k.shape[0] or q.shape[3] != k.shape[3]:
        raise ValueError(f"attention: {_shapes(q, k, v)} do not fit 'b q n d', 'b k n_kv d', 'b k n_kv d_v'")
    if 0 in (*q.shape, *k.shape, *v.shape):
        raise ValueError(f"attention over empty tensors: {_shapes(q, k, v)}; expected every axis to be at least 1 long")
    if q.shape[2] % k.shape[2]:
        raise ValueError(
            f"attention: {q.shape[2]} query heads are not a multiple of {k.shape[2]} key heads; {_shapes(q, k, v)}"
        )
    if not q.dtype == k.dtype == v.dtype or not q.device == k.device == v.device:
        raise ValueError(
            f"attention: q, k and v differ: {q.dtype}, {k.dtype}, {v.dtype} on {q.device}, {k.device}, {v.device}; "
            f"cast or move them first ({_shapes(q, k, v)})"
        )


def _shapes(q: Tensor, k: Tensor, v: Tensor) -> str:
    return f"q {tuple(q.shape)}, k {tuple(k.shape)}, v {tuple(v.shape)}"


def _check_broadcasts(name: str, tensor: Tensor, full: tuple[int, int, int, int], q: Tensor) -> None:
    if tensor.ndim != 4 or any(size not in (1, wanted) for size, wanted in zip(tensor.shape, full, strict=True)):
        raise ValueError(f"attention {name} of shape {tuple(tensor.shape)} does not broadcast to 'b n q k' = {full}")
    if tensor.device != q.device:
        raise ValueError(f"attention {name} is on {tensor.device}, q on {q.device}; move it first")


def _checked_window(window: tuple[int, int] | None, causal: bool) -> tuple[int, int] | None:
    if window is None:
        return None
    if len(window) != 2 or any(side < -1 for side in window):
        raise ValueError(
            f"attention window={window!r}; expected (left, right), each the number of visible tokens on that side, "
            "0 or more, or -1 for no limit"
        )
    left, right = window
    if (left, right) == (-1, -1):
        return None
    if causal and right != 0:
        raise ValueError(
            f"attention window={window!r} allows keys right of the diagonal, which causal=True masks; "
            f"expected ({left}, 0), or causal=False"
        )
    return left, right


def _checked_cu_seqlens(
    cu_seqlens: CuSeqlens, q: Tensor, k: Tensor
) -> tuple[tuple[Tensor, Tensor], tuple[tuple[int, ...], tuple[int, ...]] | None]:
    """Check the offsets of packed samples and return ((q's, k's) tensors on the device of `q`, (q's, k's) int tuples or
    None); None if a tensor is not on the CPU, or while torch.compile traces.
    """
    if q.shape[0] != 1:
        raise ValueError(
            f"attention cu_seqlens packs samples along the tokens of a batch of 1, but q is {tuple(q.shape)}; "
            "rearrange 'b s n d -> 1 (b s) n d'"
        )
    if isinstance(cu_seqlens, Tensor):
        if q.shape[1] != k.shape[1]:
            raise ValueError(
                f"attention cu_seqlens is one tensor for {q.shape[1]} queries and {k.shape[1]} keys; "
                "expected a pair, of queries and of keys"
            )
        cu_seqlens = (cu_seqlens, cu_seqlens)
    of_q, of_k = cu_seqlens
    for name, cu in (("queries", of_q), ("keys", of_k)):
        if cu.dtype != torch.int32:
            raise TypeError(f"attention cu_seqlens of {name} is {cu.dtype}; expected torch.int32")
        if cu.ndim != 1 or cu.shape[0] < 2:
            raise ValueError(f"attention cu_seqlens of {name} has shape {tuple(cu.shape)}; expected (samples + 1,)")
    if of_q.shape != of_k.shape:
        raise ValueError(f"attention cu_seqlens: {len(of_q) - 1} samples of queries and {len(of_k) - 1} of keys")
    offsets = None
    # tolist() would break a traced graph, and would wait for the device if the offsets were on one.
    if of_q.device.type == of_k.device.type == "cpu" and not torch.compiler.is_compiling():
        offsets = _checked_offsets("queries", of_q, q.shape[1]), _checked_offsets("keys", of_k, k.shape[1])
    return (of_q.to(q.device), of_k.to(q.device)), offsets


def _checked_offsets(name: str, cu: Tensor, length: int) -> tuple[int, ...]:
    offsets = tuple(cu.tolist())
    if offsets[0] != 0 or offsets[-1] != length or any(b < a for a, b in itertools.pairwise(offsets)):
        shown = str(list(offsets)) if len(offsets) <= 16 else f"[{offsets[0]}, ..., {offsets[-1]}]"
        raise ValueError(
            f"attention cu_seqlens of {name} is {shown}; expected ascending offsets from 0 to {length}, the number of "
            f"{name}"
        )
    return offsets
