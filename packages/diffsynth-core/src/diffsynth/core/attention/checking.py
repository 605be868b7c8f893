"""From what users give to an `AttentionCall`, or an error that shows the shapes and what was expected."""

from __future__ import annotations

import itertools

import torch
from torch import Tensor

from diffsynth.core.attention.call import AttentionCall

CuSeqlens = Tensor | tuple[Tensor, Tensor]


def check(
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
    """An `AttentionCall`, with the default scale `d ** -0.5` filled in.

    Values of `cu_seqlens` are checked where they are on the CPU, from where they are copied to the device of `q`. On
    an accelerator reading them would make the CPU wait, so there only dtype and shape are.

    Raises:
        ValueError: shapes, dtypes, devices, windows or offsets that no backend could serve.
        TypeError: a mask that is not bool, a bias that is no float, offsets that are not int32.
    """
    _check_tensors(q, k, v)
    full = (q.shape[0], q.shape[2], q.shape[1], k.shape[1])
    if mask is not None:
        if mask.dtype != torch.bool:
            raise TypeError(
                f"attention mask is {mask.dtype}; expected bool, True = may attend. "
                "What is added to the scores is given as score_bias="
            )
        _check_fits("mask", mask, full, q)
    if score_bias is not None:
        if score_bias.dtype not in (q.dtype, torch.float32):
            raise TypeError(f"attention score_bias is {score_bias.dtype}; expected {q.dtype}, as q, or torch.float32")
        _check_fits("score_bias", score_bias, full, q)
    packed = offsets = None
    if cu_seqlens is not None:
        packed, offsets = _packed(cu_seqlens, q, k)
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
        raise ValueError(f"attention over nothing: {_shapes(q, k, v)}; expected every axis to be at least 1 long")
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


def _check_fits(name: str, tensor: Tensor, full: tuple[int, int, int, int], q: Tensor) -> None:
    if tensor.ndim != 4 or any(size not in (1, wanted) for size, wanted in zip(tensor.shape, full, strict=True)):
        raise ValueError(f"attention {name} of shape {tuple(tensor.shape)} does not broadcast to 'b n q k' = {full}")
    if tensor.device != q.device:
        raise ValueError(f"attention {name} is on {tensor.device}, q on {q.device}; move it first")


def _checked_window(window: tuple[int, int] | None, causal: bool) -> tuple[int, int] | None:
    if window is None:
        return None
    if len(window) != 2 or any(side < -1 for side in window):
        raise ValueError(
            f"attention window={window!r}; expected (left, right), each the number of tokens seen on that side, "
            "0 or more, or -1 for no limit"
        )
    left, right = window
    if (left, right) == (-1, -1):
        return None
    if causal and right != 0:
        raise ValueError(
            f"attention window={window!r} reaches right of the diagonal, where causal=True sees nothing; "
            f"expected ({left}, 0), or causal=False"
        )
    return left, right


def _packed(
    cu_seqlens: CuSeqlens, q: Tensor, k: Tensor
) -> tuple[tuple[Tensor, Tensor], tuple[tuple[int, ...], tuple[int, ...]] | None]:
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
    if of_q.device.type == of_k.device.type == "cpu" and not torch.compiler.is_compiling():
        offsets = _checked_offsets("queries", of_q, q.shape[1]), _checked_offsets("keys", of_k, k.shape[1])
    return (of_q.to(q.device), of_k.to(q.device)), offsets


def _checked_offsets(name: str, cu: Tensor, length: int) -> tuple[int, ...]:
    offsets = tuple(cu.tolist())
    if offsets[0] != 0 or offsets[-1] != length or any(b < a for a, b in itertools.pairwise(offsets)):
        shown = str(list(offsets)) if len(offsets) <= 16 else f"[{offsets[0]}, ..., {offsets[-1]}]"
        raise ValueError(
            f"attention cu_seqlens of {name} is {shown}; expected offsets from 0 to {length}, the number of {name}, "
            "that never fall"
        )
    return offsets
