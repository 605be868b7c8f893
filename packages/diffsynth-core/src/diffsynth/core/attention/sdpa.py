"""Attention through `torch.nn.functional.scaled_dot_product_attention`: on every device, and compiles."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from diffsynth.core.attention.call import AttentionCall

_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


class SdpaAttention:
    """PyTorch chooses flash, memory-efficient or plain kernels by itself."""

    def refuses(self, call: AttentionCall) -> str | None:
        """Dtypes that PyTorch has no kernel for, and a bias that it would round."""
        if call.q.dtype not in _DTYPES:
            return f"dtype {call.q.dtype} is none of fp16, bf16, fp32, fp64"
        if call.score_bias is not None and call.score_bias.dtype != call.q.dtype:
            return f"it would round score_bias from {call.score_bias.dtype} to {call.q.dtype}; cast it first"
        return None

    def __call__(self, call: AttentionCall) -> Float[Tensor, "b q n d_v"]:
        """See `AttentionBackend`."""
        q, k, v = (x.transpose(1, 2) for x in (call.q, call.k, call.v))
        # PyTorch aligns its own causal mask to the first key and takes no second mask beside it.
        is_square = call.q_len == call.k_len and call.window is None and call.cu_seqlens is None
        plain_causal = call.causal and is_square and call.mask is None and call.score_bias is None
        mask = None if plain_causal else call.allowed()
        if call.score_bias is not None:
            mask = call.score_bias if mask is None else call.score_bias.masked_fill(~mask, -torch.inf)
        grouped = call.q_per_kv > 1
        if grouped and mask is not None:
            # Masked grouped heads fall back to the kernel that holds the whole score matrix; copies are smaller.
            k, v = (x.repeat_interleave(call.q_per_kv, dim=1) for x in (k, v))
            grouped = False
        out = F.scaled_dot_product_attention(
            q, k, v, attn_mask=mask, is_causal=plain_causal, scale=call.scale, enable_gqa=grouped
        )
        return out.transpose(1, 2)
