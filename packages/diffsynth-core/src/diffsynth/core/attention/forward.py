"""`attention_forward`: attention over tensors of any axis order, with the arguments of DiffSynth-Studio."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import Any

import torch
from einops import EinopsError, rearrange
from torch import Tensor

from diffsynth.core.attention import flex
from diffsynth.core.attention.call import checked_call
from diffsynth.core.attention.select import serve
from diffsynth.errors import Refused

_LAYOUT = "b s n d"
_AXES = set(_LAYOUT.split())


def attention_forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    q_pattern: str = "b n s d",
    k_pattern: str = "b n s d",
    v_pattern: str = "b n s d",
    out_pattern: str = "b n s d",
    dims: Mapping[str, int] | None = None,
    attn_mask: Tensor | None = None,
    scale: float | None = None,
    is_causal: bool = False,
    compatibility_mode: bool = False,
    window_size: int | tuple[int, int] | None = None,
    use_flex: bool = False,
    score_mod: Callable[..., Any] | None = None,
) -> Tensor:
    """Return the attention output `softmax(scale * q k^T) v` over the keys that may be attended, in the dtype of `q`
    and with the axes of `out_pattern`.

    For scripts of DiffSynth-Studio; new code calls `attention()`.

    Args:
        q, k, v: queries, keys and values.
        q_pattern, k_pattern, v_pattern, out_pattern: einops patterns of the axes b, s, n and d, as in "b s (n d)".
        dims: sizes of the axes that a pattern merges, as in `{"n": 24}`.
        attn_mask: bool, True = may attend, or floating point, added to the scaled scores, as in PyTorch; broadcasts to
            `b n q k` from the right.
        scale: factor on the scores; None is `d ** -0.5`.
        is_causal: query `i` may attend key `j` only if `j <= i + (k_len - q_len)`.
        compatibility_mode: use PyTorch's backend, which runs on every device.
        window_size: number of visible tokens on the left and on the right, or on both sides; -1 is no limit. With
            `is_causal`, none are visible on the right.
        use_flex: use the backend `flex`.
        score_mod: modifies scores, `f(score, batch, head, query, key)`; only `flex` supports it.

    Raises:
        Refused: the selected backend cannot serve the call.
        ValueError: a pattern of other axes, tensors that do not fit, or `compatibility_mode` with flex.
    """
    q, k, v = (
        _arranged(tensor, f"{_checked(pattern, name)} -> {_LAYOUT}", dims)
        for tensor, pattern, name in ((q, q_pattern, "q"), (k, k_pattern, "k"), (v, v_pattern, "v"))
    )
    _checked(out_pattern, "out")
    if attn_mask is not None:
        # PyTorch's masks broadcast from the right; `AttentionCall` needs all four axes.
        attn_mask = attn_mask[(None,) * (4 - attn_mask.ndim)]
    is_bias = attn_mask is not None and attn_mask.dtype != torch.bool
    call = checked_call(
        q,
        k,
        v,
        mask=None if is_bias else attn_mask,
        score_bias=attn_mask if is_bias else None,
        causal=is_causal,
        scale=scale,
        window=_window(window_size, is_causal),
    )
    wants_flex = use_flex or score_mod is not None
    if wants_flex and compatibility_mode:
        raise ValueError("attention_forward: compatibility_mode=True uses torch's backend, not flex; give one of them")
    if score_mod is None:
        out = serve(call, "flex" if use_flex else "sdpa" if compatibility_mode else None)
    else:
        if reason := flex.FlexAttention().refuses(call):
            raise Refused(f"attention_forward with score_mod: flex refuses this call: {reason} ({call.describe()})")
        out = flex.flex(call, score_mod)
    return _arranged(out, f"{_LAYOUT} -> {out_pattern}", None)


def _window(size: int | tuple[int, int] | None, is_causal: bool) -> tuple[int, int] | None:
    if size is None:
        return None
    left, right = (size, size) if isinstance(size, int) else size
    return (left, -1 if left == -1 else 0) if is_causal else (left, right)


def _checked(pattern: str, name: str) -> str:
    if set(re.findall(r"\w+", pattern)) != _AXES:
        raise ValueError(f"{name}_pattern={pattern!r}: expected the axes b, s, n and d, each once, as in 'b s (n d)'")
    return pattern


def _arranged(tensor: Tensor, pattern: str, dims: Mapping[str, int] | None) -> Tensor:
    before, _, after = (side.strip() for side in pattern.partition("->"))
    if before == after:
        return tensor
    try:
        return rearrange(tensor, pattern, **(dims or {}))
    except EinopsError as error:
        raise ValueError(f"tensor of shape {tuple(tensor.shape)} as {before!r}, dims={dims}: {error}") from error
