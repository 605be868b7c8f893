"""Attention through `torch.nn.functional.scaled_dot_product_attention`: on every device, and compiles."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Literal

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from diffsynth.core.attention import chunks, workspace
from diffsynth.core.attention.call import AttentionCall

Kernel = Literal["flash", "cudnn", "efficient", "math"]

_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
_TORCH_NAMES = {
    "flash": SDPBackend.FLASH_ATTENTION,
    "cudnn": SDPBackend.CUDNN_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
    "math": SDPBackend.MATH,
}


class SdpaAttention:
    """Packed samples are served one by one where their lengths are known, long windowed calls in chunks.

    Args:
        kernel: None lets PyTorch choose. One by name is forced with `torch.nn.attention.sdpa_kernel`, which switches
            the others off in all threads while the call is being started.
    """

    def __init__(self, kernel: Kernel | None = None) -> None:
        self.kernel = kernel

    def refuses(self, call: AttentionCall) -> str | None:
        """Dtypes that PyTorch has no kernel for, a bias that it would round, and what the kernel by name cannot do."""
        if call.q.dtype not in _DTYPES:
            return f"dtype {call.q.dtype} is none of fp16, bf16, fp32, fp64"
        if call.score_bias is not None and call.score_bias.dtype != call.q.dtype:
            return f"it would round score_bias from {call.score_bias.dtype} to {call.q.dtype}; cast it first"
        if self.kernel is None or self.kernel == "math":
            return None
        return _cpu_refusal(self.kernel, call) if call.q.device.type == "cpu" else _cuda_refusal(self.kernel, call)

    def avoids(self, call: AttentionCall) -> str | None:
        """Single kernels, which are for those who ask; on an accelerator, what there is no kernel for."""
        if self.kernel is not None:
            return "it is one kernel of sdpa, for those who ask for it"
        if call.q.device.type != "cpu" and (call.window is not None or call.cu_seqlens is not None):
            return "PyTorch has no kernel for windows and packed samples; it would go piece by piece"
        return None

    def workspace(self, call: AttentionCall, device_type: str) -> int:
        """See `AttentionBackend`."""
        return workspace.score_matrix(call) if self.kernel == "math" else workspace.fused(call)

    def __call__(self, call: AttentionCall) -> Float[Tensor, "b q n d_v"]:
        """See `AttentionBackend`."""
        if call.offsets is not None:
            return chunks.joined(chunks.by_sample(call), call, self)
        is_banded = call.limits != (-1, -1) and not _is_plain_causal(call) and call.cu_seqlens is None
        if is_banded and call.q_len > chunks.CHUNK:
            return chunks.joined(chunks.by_chunk(call), call, self._attend)
        return self._attend(call)

    def _attend(self, call: AttentionCall) -> Float[Tensor, "b q n d_v"]:
        q, k, v = (x.transpose(1, 2) for x in (call.q, call.k, call.v))
        is_causal = _is_plain_causal(call)
        mask = None if is_causal else call.allowed()
        if call.score_bias is not None:
            mask = call.score_bias if mask is None else call.score_bias.masked_fill(~mask, -torch.inf)
        grouped = call.q_per_kv > 1
        if grouped and (mask is not None or self.kernel == "efficient"):
            # Masked grouped heads fall back to the kernel that holds the whole score matrix; copies are smaller.
            k, v = (x.repeat_interleave(call.q_per_kv, dim=1) for x in (k, v))
            grouped = False
        with nullcontext() if self.kernel is None else sdpa_kernel(_TORCH_NAMES[self.kernel]):
            out = F.scaled_dot_product_attention(
                q, k, v, attn_mask=mask, is_causal=is_causal, scale=call.scale, enable_gqa=grouped
            )
        return out.transpose(1, 2)


def _is_plain_causal(call: AttentionCall) -> bool:
    """Whether `is_causal` of PyTorch says it all: it stands at the first key, and takes no mask beside it."""
    return call.limits == (-1, 0) and call.q_len == call.k_len and not _has_tensors(call)


def _has_tensors(call: AttentionCall) -> bool:
    return call.mask is not None or call.score_bias is not None or call.cu_seqlens is not None


def _takes_mask(call: AttentionCall) -> bool:
    """Whether PyTorch would be given a mask, in any piece of the call."""
    if call.mask is not None or call.score_bias is not None or call.window is not None:
        return True
    if call.cu_seqlens is None:
        return call.causal and not _is_plain_causal(call)
    return call.offsets is None or (call.causal and call.offsets[0] != call.offsets[1])


def _cpu_refusal(kernel: str, call: AttentionCall) -> str | None:
    if kernel != "flash":
        return f"tensors are on cpu; sdpa_{kernel} needs cuda"
    if call.q.shape[-1] != call.v.shape[-1]:
        return f"head dim {call.q.shape[-1]} of queries and {call.v.shape[-1]} of values differ"
    if call.score_bias is not None and call.needs_grad and call.score_bias.requires_grad:
        return "it has no gradient of score_bias"
    return None


def _cuda_refusal(kernel: str, call: AttentionCall) -> str | None:
    from torch.backends import cuda

    if call.q.device.type != "cuda":
        return f"tensors are on {call.q.device.type}; sdpa_{kernel} needs cuda"
    mask = None
    if _takes_mask(call):
        if kernel == "flash":
            return "it takes no mask, and this call needs one"
        b, q_len, n, _ = call.q.shape
        kind = torch.bool if call.score_bias is None else call.q.dtype
        mask = torch.ones((), dtype=kind, device=call.q.device).expand(b, n, q_len, call.k_len)
    q, k, v = (x.transpose(1, 2) for x in (call.q, call.k, call.v))
    grouped = call.q_per_kv > 1
    if grouped and (mask is not None or kernel == "efficient"):
        k, v = (x.repeat_interleave(call.q_per_kv, dim=1) for x in (k, v))
        grouped = False
    params = cuda.SDPAParams(q, k, v, mask, 0.0, _is_plain_causal(call), grouped)
    can_use = {
        "flash": cuda.can_use_flash_attention,
        "cudnn": cuda.can_use_cudnn_attention,
        "efficient": cuda.can_use_efficient_attention,
    }[kernel]
    return None if can_use(params, debug=False) else f"PyTorch's {kernel} kernel does not take these tensors here"
