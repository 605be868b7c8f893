"""SageAttention (Zhang et al. 2024, arXiv:2410.02367): attention with queries and keys quantized to 8 bits."""

from __future__ import annotations

from jaxtyping import Float
from torch import Tensor

from diffsynth.core.attention.call import AttentionCall
from diffsynth.core.attention.libraries.probing import (
    device_refusal,
    function,
    function_refusal,
    half_refusal,
    missing,
)

_NAME = "sage_attention"
_PACKED = ("cu_seqlens_q", "cu_seqlens_k", "max_seqlen_q", "max_seqlen_k")


class SageAttention:
    """Backend of the library sageattention: inference only, and inexact because of 8-bit scores."""

    def refuses(self, call: AttentionCall) -> str | None:
        """Return a text why the call is refused (device, library, dtype, head dim, options, or gradients), or None if
        it is served.
        """
        if reason := device_refusal(_NAME, call, range(8, 13)) or missing("sageattention"):
            return reason
        if reason := half_refusal(call, max_head_dim=128) or _content_refusal(call):
            return reason
        if call.cu_seqlens is None:
            return function_refusal("sageattention", "sageattn", "tensor_layout", "is_causal", "sm_scale")
        return function_refusal("sageattention", "sageattn_varlen", *_PACKED, "is_causal", "sm_scale")

    def avoids(self, call: AttentionCall) -> str | None:
        """Return a text, never None, why `auto` prefers other backends for every call: its result is inexact."""
        return "its 8-bit scores are inexact; it is used only if selected by name"

    def __call__(self, call: AttentionCall) -> Float[Tensor, "b q n d_v"]:
        """Return the attention output in the dtype of `call.q`."""
        settings = {"is_causal": call.causal, "sm_scale": call.scale}
        if call.cu_seqlens is None:
            attend = function("sageattention", "sageattn")
            return attend(call.q, call.k, call.v, tensor_layout="NHD", **settings)
        packed = dict(zip(_PACKED, (*call.cu_seqlens, *call.longest), strict=True))
        attend = function("sageattention", "sageattn_varlen")
        return attend(call.q[0], call.k[0], call.v[0], **packed, **settings)[None]


def _content_refusal(call: AttentionCall) -> str | None:
    if call.mask is not None:
        return "it takes no mask"
    if call.window is not None:
        return "it takes no window"
    if call.score_bias is not None:
        return "it takes no score_bias"
    if call.needs_grad:
        return "it has no gradients"
    dims = (64, 96, 128) if call.cu_seqlens is None else (64, 128)
    if call.q.shape[-1] not in dims:
        return f"head dim {call.q.shape[-1]} is none of {', '.join(map(str, dims))}"
    if call.causal:
        # Its causal mask is aligned to the first key, that of `AttentionCall` to the last.
        if call.cu_seqlens is None and call.q_len != call.k_len:
            return f"causal over {call.q_len} queries and {call.k_len} keys: it aligns them at the first"
        if call.cu_seqlens is not None and (call.offsets is None or call.offsets[0] != call.offsets[1]):
            return "causal over samples whose query and key lengths differ or are unknown: it aligns them at the first"
    if call.cu_seqlens is not None and (call.offsets is None or _has_keyless(call)):
        return "packed samples of unknown lengths, or with queries but no keys"
    return None


def _has_keyless(call: AttentionCall) -> bool:
    assert call.offsets is not None
    of_q, of_k = call.offsets
    return any(of_q[i] < of_q[i + 1] and of_k[i] == of_k[i + 1] for i in range(len(of_q) - 1))
