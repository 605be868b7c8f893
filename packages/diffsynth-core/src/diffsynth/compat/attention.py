"""Attention functions named after one backend, with the arguments of DiffSynth-Studio.

New code calls `attention(..., backend=)`. Patterns, `dims`, `scale`, `is_causal` and `window_size` are those of
`attention_forward`. Each function raises `Refused` with the reason if its backend is not installed or cannot serve the
call, and ValueError if the arguments do not fit together.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor

from diffsynth.core.attention.forward import attention_forward
from diffsynth.core.attention.select import use_attention

_DEFAULT = "b n s d"


def flash_attention_2(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    q_pattern: str = _DEFAULT,
    k_pattern: str = _DEFAULT,
    v_pattern: str = _DEFAULT,
    out_pattern: str = _DEFAULT,
    dims: Mapping[str, int] | None = None,
    scale: float | None = None,
    is_causal: bool = False,
    window_size: int | tuple[int, int] | None = None,
) -> Tensor:
    """Return the output of attention by FlashAttention 2, a tensor with axes in the order of `out_pattern`.

    It raises Refused if that backend cannot serve the call.
    """
    patterns = (q_pattern, k_pattern, v_pattern, out_pattern)
    with use_attention("flash_attention_2"):
        return attention_forward(q, k, v, *patterns, dims, scale=scale, is_causal=is_causal, window_size=window_size)


def flash_attention_3(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    q_pattern: str = _DEFAULT,
    k_pattern: str = _DEFAULT,
    v_pattern: str = _DEFAULT,
    out_pattern: str = _DEFAULT,
    dims: Mapping[str, int] | None = None,
    scale: float | None = None,
    is_causal: bool = False,
    window_size: int | tuple[int, int] | None = None,
) -> Tensor:
    """Return the output of attention by FlashAttention 3, a tensor with axes in the order of `out_pattern`.

    It raises Refused if that backend cannot serve the call.
    """
    patterns = (q_pattern, k_pattern, v_pattern, out_pattern)
    with use_attention("flash_attention_3"):
        return attention_forward(q, k, v, *patterns, dims, scale=scale, is_causal=is_causal, window_size=window_size)


def flash_attention_4(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    q_pattern: str = _DEFAULT,
    k_pattern: str = _DEFAULT,
    v_pattern: str = _DEFAULT,
    out_pattern: str = _DEFAULT,
    dims: Mapping[str, int] | None = None,
    scale: float | None = None,
    is_causal: bool = False,
    window_size: int | tuple[int, int] | None = None,
) -> Tensor:
    """Return the output of attention by FlashAttention 4, a tensor with axes in the order of `out_pattern`.

    It raises Refused if that backend cannot serve the call.
    """
    patterns = (q_pattern, k_pattern, v_pattern, out_pattern)
    with use_attention("flash_attention_4"):
        return attention_forward(q, k, v, *patterns, dims, scale=scale, is_causal=is_causal, window_size=window_size)


def sage_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    q_pattern: str = _DEFAULT,
    k_pattern: str = _DEFAULT,
    v_pattern: str = _DEFAULT,
    out_pattern: str = _DEFAULT,
    dims: Mapping[str, int] | None = None,
    scale: float | None = None,
) -> Tensor:
    """Return the output of attention by SageAttention (8 bits), a tensor with axes in the order of `out_pattern`.

    It raises Refused if that backend cannot serve the call.
    """
    patterns = (q_pattern, k_pattern, v_pattern, out_pattern)
    with use_attention("sage_attention"):
        return attention_forward(q, k, v, *patterns, dims, scale=scale)


def xformers_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    q_pattern: str = _DEFAULT,
    k_pattern: str = _DEFAULT,
    v_pattern: str = _DEFAULT,
    out_pattern: str = _DEFAULT,
    dims: Mapping[str, int] | None = None,
    scale: float | None = None,
) -> Tensor:
    """Return the output of attention by xFormers, a tensor with axes in the order of `out_pattern`.

    It raises Refused if that backend cannot serve the call.
    """
    patterns = (q_pattern, k_pattern, v_pattern, out_pattern)
    with use_attention("xformers"):
        return attention_forward(q, k, v, *patterns, dims, scale=scale)


def flex_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    q_pattern: str = _DEFAULT,
    k_pattern: str = _DEFAULT,
    v_pattern: str = _DEFAULT,
    out_pattern: str = _DEFAULT,
    dims: Mapping[str, int] | None = None,
    attn_mask: Tensor | None = None,
    scale: float | None = None,
    score_mod: Callable[..., Any] | None = None,
) -> Tensor:
    """Return the output of attention by PyTorch's FlexAttention, a tensor with axes in the order of `out_pattern`.

    It raises Refused if that backend cannot serve the call.

    `score_mod` is that of `attention_forward`.
    """
    patterns = (q_pattern, k_pattern, v_pattern, out_pattern)
    with use_attention("flex"):
        return attention_forward(q, k, v, *patterns, dims, attn_mask=attn_mask, scale=scale, score_mod=score_mod)


def torch_sdpa_sliding_window(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    sliding_window: int,
    q_pattern: str = _DEFAULT,
    k_pattern: str = _DEFAULT,
    v_pattern: str = _DEFAULT,
    out_pattern: str = _DEFAULT,
    dims: Mapping[str, int] | None = None,
    scale: float | None = None,
) -> Tensor:
    """Return the output of attention, a tensor with axes in the order of `out_pattern`, by PyTorch, where each query
    sees only the tokens at most `sliding_window` places before or after it.
    """
    patterns = (q_pattern, k_pattern, v_pattern, out_pattern)
    with use_attention("sdpa"):
        return attention_forward(q, k, v, *patterns, dims, scale=scale, window_size=sliding_window)
