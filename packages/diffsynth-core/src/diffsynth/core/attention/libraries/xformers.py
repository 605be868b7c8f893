"""Memory-efficient attention of xFormers."""

from __future__ import annotations

import importlib
import itertools
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from diffsynth.core.attention.call import AttentionCall
from diffsynth.core.attention.libraries.probing import device_refusal, function, function_refusal, missing

_MAX_HEAD_DIM = 256
"""Largest head dim that all of its kernels support."""


class XformersAttention:
    """Backend of the library xformers, for plain, causal and windowed calls and packed samples.

    Masks and biases are refused, because xFormers needs them padded.
    """

    def refuses(self, call: AttentionCall) -> str | None:
        """Return a text why the call is refused (device, library, dtype, head dims, or options), or None if it is
        served.
        """
        if reason := device_refusal("xformers", call) or missing("xformers"):
            return reason
        if call.q.dtype not in (torch.float16, torch.bfloat16, torch.float32):
            return f"dtype {call.q.dtype} is none of fp16, bf16, fp32"
        if max(call.q.shape[-1], call.v.shape[-1]) > _MAX_HEAD_DIM or call.q.shape[-1] % 8 or call.v.shape[-1] % 8:
            return f"head dims {call.q.shape[-1]} and {call.v.shape[-1]} are not multiples of 8 up to {_MAX_HEAD_DIM}"
        if reason := _content_refusal(call):
            return reason
        return function_refusal("xformers.ops", "memory_efficient_attention", "attn_bias", "scale")

    def __call__(self, call: AttentionCall) -> Float[Tensor, "b q n d_v"]:
        """Return the attention output in the dtype of `call.q`."""
        attend = function("xformers.ops", "memory_efficient_attention")
        q, k, v = call.q, call.k, call.v
        if call.q_per_kv > 1:
            # xFormers takes grouped heads as an axis of q, k and v; expand() copies nothing.
            q = q.unflatten(2, (k.shape[2], call.q_per_kv))
            k, v = (x[:, :, :, None].expand(-1, -1, -1, call.q_per_kv, -1) for x in (k, v))
        out = attend(q, k, v, attn_bias=_bias(call), scale=call.scale)
        return out.flatten(2, 3) if call.q_per_kv > 1 else out


def _content_refusal(call: AttentionCall) -> str | None:
    if call.mask is not None:
        return "it takes no bool mask"
    if call.score_bias is not None:
        return "it takes no score_bias without padding"
    if call.cu_seqlens is not None:
        if call.window is not None:
            return "it takes no window over packed samples"
        if call.offsets is None:
            return "it needs the lengths of packed samples on the CPU"
        if any(q > 0 and (k == 0 or (call.causal and q > k)) for q, k in zip(*_lengths(call), strict=True)):
            return "a packed sample has queries without keys"
    elif call.limits != (-1, -1) and call.q_len > call.k_len:
        return f"causal or windowed, {call.q_len} queries over {call.k_len} keys: the first have no key"
    return None


def _bias(call: AttentionCall) -> Any:
    """Return an attention bias object of xFormers that describes which pairs may attend; None if all may."""
    if call.is_plain:
        return None
    biases = importlib.import_module("xformers.ops.fmha.attn_bias")
    if call.cu_seqlens is not None:
        of_q, of_k = _lengths(call)
        packed = biases.BlockDiagonalMask.from_seqlens(of_q, of_k)
        return packed.make_causal_from_bottomright() if call.causal else packed
    left, right = call.limits
    if (left, right) == (-1, 0):
        return biases.LowerTriangularFromBottomRightMask()
    # xFormers cannot express a side without limit: use the number of all tokens.
    all_tokens = max(call.q_len, call.k_len)
    return biases.LocalAttentionFromBottomRightMask(
        window_left=all_tokens if left < 0 else left, window_right=all_tokens if right < 0 else right
    )


def _lengths(call: AttentionCall) -> tuple[list[int], list[int]]:
    assert call.offsets is not None
    of_q, of_k = ([after - before for before, after in itertools.pairwise(x)] for x in call.offsets)
    return of_q, of_k
