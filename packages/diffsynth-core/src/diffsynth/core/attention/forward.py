"""`attention_forward`: attention over tensors of any axis order, under the arguments that older code passes."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import Any

import torch
from einops import EinopsError, rearrange
from torch import Tensor

from diffsynth.core.attention.select import attention
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
    window_size: tuple[int, int] | None = None,
    use_flex: bool = False,
    score_mod: Callable[..., Any] | None = None,
) -> Tensor:
    """`softmax(scale * q k^T) v`, in the dtype of `q`, its axes as `out_pattern` says. New code calls `attention()`.

    Args:
        q, k, v: queries, keys and values.
        q_pattern, k_pattern, v_pattern, out_pattern: einops patterns of the axes b, s, n and d, "b s (n d)".
        dims: sizes of the axes that a pattern joins, `{"n": 24}`.
        attn_mask: bool, True = may attend; broadcasts to `b n q k` from the right.
        scale: None is `d ** -0.5`.
        is_causal: query `i` may attend key `j` only if `j <= i + (k_len - q_len)`.
        compatibility_mode: the backend that is everywhere, torch's.
        window_size: None or (-1, -1), no window.
        use_flex, score_mod: not in this version.

    Raises:
        Refused: a mask that is added to scores, a window, or a changed score: no backend of this version does it.
        ValueError: a pattern of other axes, or tensors that do not fit.
    """
    _refuse(attn_mask, window_size, use_flex, score_mod)
    q, k, v = (
        _arranged(tensor, f"{_checked(pattern, name)} -> {_LAYOUT}", dims)
        for tensor, pattern, name in ((q, q_pattern, "q"), (k, k_pattern, "k"), (v, v_pattern, "v"))
    )
    _checked(out_pattern, "out")
    if attn_mask is not None:
        attn_mask = attn_mask[(None,) * (4 - attn_mask.ndim)]
    backend = "sdpa" if compatibility_mode else None
    out = attention(q, k, v, mask=attn_mask, causal=is_causal, scale=scale, backend=backend)
    return _arranged(out, f"{_LAYOUT} -> {out_pattern}", None)


def _refuse(mask: Tensor | None, window_size: Any, use_flex: bool, score_mod: Any) -> None:
    reasons = {
        "attn_mask": mask is not None and mask.dtype != torch.bool and "it is no bool mask; True = may attend",
        "window_size": window_size not in (None, (-1, -1)) and f"{window_size} would need a sliding window",
        "use_flex": use_flex and "there is no flex attention",
        "score_mod": score_mod is not None and "no backend changes scores",
    }
    for name, reason in reasons.items():
        if reason:
            raise Refused(f"attention_forward refuses {name}: {reason}; this version's backends cannot do it")


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
