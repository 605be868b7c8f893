"""FlashAttention 2, 3 and 4 (Dao 2023, arXiv:2307.08691; Shah et al. 2024, arXiv:2407.08608).

All three take `b s n d` and grouped heads, align `causal` and windows to the last query and key as `AttentionCall` does
(2 since its version 2.1), and give zeros for a query without keys.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

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

_PACKED = ("cu_seqlens_q", "cu_seqlens_k", "max_seqlen_q", "max_seqlen_k")


@dataclass(frozen=True)
class FlashAttention:
    """Backend of one generation of flash-attn.

    Args:
        name: name of the backend.
        module: the module with `flash_attn_func` and `flash_attn_varlen_func`.
        capabilities: major CUDA compute capabilities that it has kernels for.
        rocm: whether it has kernels for AMD devices.
        no_limit: the value of `window_size` for a side without limit.
        has_gradients: whether it supports a backward pass.
        max_head_dim: largest head dim.
    """

    name: str
    module: str
    capabilities: range
    rocm: bool = False
    no_limit: int | None = -1
    has_gradients: bool = True
    max_head_dim: int = 256

    def refuses(self, call: AttentionCall) -> str | None:
        """Return a text why the call is refused (device, library, dtype, head dim, mask, score bias, or gradients), or
        None if it is served.
        """
        if reason := device_refusal(self.name, call, self.capabilities, rocm=self.rocm) or missing(self.module):
            return reason
        if reason := half_refusal(call, max_head_dim=self.max_head_dim):
            return reason
        if call.mask is not None:
            return "it takes no mask"
        if call.score_bias is not None:
            return "it takes no score_bias"
        if call.needs_grad and not self.has_gradients:
            return "its gradients are not complete"
        packed = () if call.cu_seqlens is None else _PACKED
        return function_refusal(self.module, _function_name(call), *packed, "softmax_scale", "causal", "window_size")

    def __call__(self, call: AttentionCall) -> Float[Tensor, "b q n d_v"]:
        """Return the attention output in the dtype of `call.q`."""
        attend = function(self.module, _function_name(call))
        window = call.window or (-1, -1)
        settings: dict[str, Any] = {
            "softmax_scale": call.scale,
            "causal": call.causal,
            "window_size": tuple(self.no_limit if side < 0 else side for side in window),
        }
        if call.cu_seqlens is None:
            return _output_of(attend(call.q, call.k, call.v, **settings))
        packed = dict(zip(_PACKED, (*call.cu_seqlens, *call.longest), strict=True))
        return _output_of(attend(call.q[0], call.k[0], call.v[0], **packed, **settings))[None]


def _function_name(call: AttentionCall) -> str:
    return "flash_attn_func" if call.cu_seqlens is None else "flash_attn_varlen_func"


def _output_of(result: Any) -> Tensor:
    # Version 4, and some of 3, return (output, logsumexp).
    return result if isinstance(result, Tensor) else result[0]


FLASH_ATTENTION_2 = FlashAttention("flash_attention_2", "flash_attn", range(8, 13), rocm=True)
FLASH_ATTENTION_3 = FlashAttention("flash_attention_3", "flash_attn_interface", range(9, 10))
FLASH_ATTENTION_4 = FlashAttention(
    "flash_attention_4", "flash_attn.cute", range(9, 11), no_limit=None, has_gradients=False, max_head_dim=128
)
