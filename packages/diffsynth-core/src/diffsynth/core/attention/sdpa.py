"""Attention by `torch.nn.functional.scaled_dot_product_attention`, which runs on every device and can be compiled."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Literal

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from diffsynth.core.attention import chunks
from diffsynth.core.attention.call import AttentionCall
from diffsynth.core.attention.meta import fused_workspace, score_matrix_workspace

Kernel = Literal["flash", "cudnn", "efficient", "math"]

_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
_TORCH_NAMES = {
    "flash": SDPBackend.FLASH_ATTENTION,
    "cudnn": SDPBackend.CUDNN_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
    "math": SDPBackend.MATH,
}


class SdpaAttention:
    """Backend of PyTorch's own attention.

    Packed samples are served one by one if their lengths are known, and long windowed calls in chunks.

    Args:
        kernel: the kernel to use; None lets PyTorch choose. A named kernel is forced by
            `torch.nn.attention.sdpa_kernel`, which disables the others in all threads while the call is launched.
    """

    def __init__(self, kernel: Kernel | None = None) -> None:
        self.kernel = kernel

    def refuses(self, call: AttentionCall) -> str | None:
        """Return a text why the call is refused (its dtype, a bias of another dtype, or what the named `kernel` does
        not support), or None if it is served.
        """
        if call.q.dtype not in _DTYPES:
            return f"dtype {call.q.dtype} is none of fp16, bf16, fp32, fp64"
        if call.score_bias is not None and call.score_bias.dtype != call.q.dtype:
            return f"it would round score_bias from {call.score_bias.dtype} to {call.q.dtype}; cast it first"
        if self.kernel is None or self.kernel == "math":
            return None
        return _cpu_refusal(self.kernel, call) if call.q.device.type == "cpu" else _cuda_refusal(self.kernel, call)

    def avoids(self, call: AttentionCall) -> str | None:
        """Return a text why `auto` prefers other backends (this is one named kernel; a window or packed samples off the
        CPU), or None if it does not.
        """
        if self.kernel is not None:
            return "it is a single kernel of sdpa, used only if selected by name"
        if call.q.device.type != "cpu" and (call.window is not None or call.cu_seqlens is not None):
            return "PyTorch has no kernel for windows and packed samples; it would serve them in chunks"
        return None

    def workspace(self, call: AttentionCall, device_type: str) -> int:
        """Return the backend's scratch memory for a call, in bytes: all scores with the kernel "math", else logsumexp
        and mask.
        """
        return score_matrix_workspace(call) if self.kernel == "math" else fused_workspace(call)

    def __call__(self, call: AttentionCall) -> Float[Tensor, "b q n d_v"]:
        """Return the attention output in the dtype of `call.q`."""
        if call.offsets is not None:
            return chunks.attend_in_chunks(chunks.by_sample(call), call, self)
        is_banded = call.limits != (-1, -1) and not _is_plain_causal(call) and call.cu_seqlens is None
        if is_banded and call.q_len > chunks.CHUNK:
            return chunks.attend_in_chunks(chunks.by_window(call), call, self._attend)
        return self._attend(call)

    def _attend(self, call: AttentionCall) -> Float[Tensor, "b q n d_v"]:
        q, k, v = (x.transpose(1, 2) for x in (call.q, call.k, call.v))
        is_causal = _is_plain_causal(call)
        mask = None if is_causal else call.allowed()
        if call.score_bias is not None:
            mask = call.score_bias if mask is None else call.score_bias.masked_fill(~mask, -torch.inf)
        grouped = call.q_per_kv > 1
        if grouped and (mask is not None or self.kernel == "efficient"):
            # PyTorch serves masked grouped heads by the math kernel, whose score matrix is larger than these copies.
            k, v = (x.repeat_interleave(call.q_per_kv, dim=1) for x in (k, v))
            grouped = False
        with nullcontext() if self.kernel is None else sdpa_kernel(_TORCH_NAMES[self.kernel]):
            out = F.scaled_dot_product_attention(
                q, k, v, attn_mask=mask, is_causal=is_causal, scale=call.scale, enable_gqa=grouped
            )
        return out.transpose(1, 2)


def _is_plain_causal(call: AttentionCall) -> bool:
    """Whether PyTorch's `is_causal` alone describes the call: causal without left limit, as many queries as keys, no
    mask, bias or packed samples.
    """
    return call.limits == (-1, 0) and call.q_len == call.k_len and not _has_tensors(call)


def _has_tensors(call: AttentionCall) -> bool:
    return call.mask is not None or call.score_bias is not None or call.cu_seqlens is not None


def _takes_mask(call: AttentionCall) -> bool:
    """Whether a mask or bias is passed to PyTorch for the call or one of its chunks."""
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
