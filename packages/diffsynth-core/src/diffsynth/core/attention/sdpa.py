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
        """Dtypes that PyTorch has no kernel for."""
        return None if call.q.dtype in _DTYPES else f"dtype {call.q.dtype} is none of fp16, bf16, fp32, fp64"

    def __call__(self, call: AttentionCall) -> Float[Tensor, "b q n d_v"]:
        """See `AttentionBackend`."""
        q, k, v = (x.transpose(1, 2) for x in (call.q, call.k, call.v))
        # PyTorch aligns its own causal mask to the first key and takes no second mask beside it.
        plain_causal = call.causal and call.mask is None and q.shape[2] == k.shape[2]
        mask = None if plain_causal else call.allowed()
        grouped = call.q_per_kv > 1
        if grouped and mask is not None:
            # Masked grouped heads fall back to the kernel that holds the whole score matrix; copies are smaller.
            k, v = (x.repeat_interleave(call.q_per_kv, dim=1) for x in (k, v))
            grouped = False
        out = F.scaled_dot_product_attention(
            q, k, v, attn_mask=mask, is_causal=plain_causal, scale=call.scale, enable_gqa=grouped
        )
        return out.transpose(1, 2)
