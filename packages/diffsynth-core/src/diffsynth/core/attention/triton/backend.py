"""The backends `triton` and `triton_int8`. They import Triton at their first call."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from diffsynth import _env
from diffsynth.core.attention.call import AttentionCall
from diffsynth.core.attention.libraries.probing import device_refusal, missing
from diffsynth.core.attention.triton.configs import capability_of, rows_for

_NAME = "triton"
_DTYPES = (torch.float16, torch.bfloat16, torch.float32)
_LARGEST_HEAD_DIM = 256
_TILE = 64


class TritonAttention:
    """Backend of FlashAttention-2 with masks, windows, packed samples and grouped heads, forward and backward.

    On a CPU it runs only under TRITON_INTERPRET=1, set before Triton is imported, which is meant for tests.
    """

    def refuses(self, call: AttentionCall) -> str | None:
        """Return a text why the call is refused (Triton missing, device, dtype, head dim over 256, scale not above 0,
        score bias, mask with packed samples), or None if served.
        """
        return missing("triton") or _device_refusal(call) or _content_refusal(call)

    def avoids(self, call: AttentionCall) -> str | None:
        """Return a text why `auto` prefers other backends (on a CPU, or a GPU whose block sizes were not timed), or
        None if it does not.
        """
        capability = capability_of(call.q.device)
        if capability is None:
            return "Triton's interpreter is slow"
        rows = rows_for(capability, fp32=call.q.dtype == torch.float32)
        return None if all(row.tuned for row in rows) else f"its kernels were not timed on sm_{capability}"

    def workspace(self, call: AttentionCall, device_type: str) -> int:
        """Return the backend's scratch memory for a call, in bytes: logsumexp, padded copies of tensors, and the block
        lists of a mask.

        The logsumexp is fp32 per query. Tensors and masks whose rows are not a multiple of 16 long are copied. A block
        of the mask has an int8 state, an int64 index of the sort and an int32 entry of the list.
        """
        b, q_len, n, _ = call.q.shape
        size = 4 * b * n * q_len + sum(map(_padded_bytes, (call.q, call.k, call.v)))
        if call.mask is not None:
            tiles = call.mask.shape[0] * call.mask.shape[1] * -(-q_len // _TILE) * -(-call.k_len // _TILE)
            size += tiles * (1 + 8 + 4) + _padded_bytes(call.mask)
        return size

    def __call__(self, call: AttentionCall) -> Float[Tensor, "b q n d_v"]:
        """Return the attention output in the dtype of `call.q`."""
        from diffsynth.core.attention.triton.op import flash_attention

        cu_seqlens = list(call.cu_seqlens or ())
        out, _ = flash_attention(call.q, call.k, call.v, call.mask, cu_seqlens, call.scale, list(call.limits))
        return out


class TritonInt8Attention:
    """Backend of the forward kernel with queries and keys quantized to 8 bits: inference only, and inexact."""

    def refuses(self, call: AttentionCall) -> str | None:
        """Return a text why the call is refused (by the conditions of the backend `triton`, or fp32, packed samples or
        gradients), or None if it is served.
        """
        if reason := missing("triton") or _device_refusal(call, "triton_int8") or _content_refusal(call):
            return reason
        if call.q.dtype == torch.float32:
            return "dtype torch.float32 is neither fp16 nor bf16"
        if call.cu_seqlens is not None:
            return "it takes no cu_seqlens"
        return "it has no gradients" if call.needs_grad else None

    def avoids(self, call: AttentionCall) -> str | None:
        """Return a text, never None, why `auto` prefers other backends for every call: its result is inexact."""
        return "its 8-bit scores are inexact; it is used only if selected by name"

    def workspace(self, call: AttentionCall, device_type: str) -> int:
        """Return the backend's scratch memory for a call, in bytes: that of the backend `triton`, and 8-bit copies of
        queries and keys.
        """
        return TritonAttention().workspace(call, device_type) + call.q.numel() + call.k.numel()

    def __call__(self, call: AttentionCall) -> Float[Tensor, "b q n d_v"]:
        """Return the attention output in the dtype of `call.q`."""
        from diffsynth.core.attention.triton.int8 import flash_attention_int8

        return flash_attention_int8(call.q, call.k, call.v, call.mask, call.scale, list(call.limits))


def _padded_bytes(x: Tensor) -> int:
    d = x.shape[3]
    return x.numel() // d * (d + -d % 16) * x.element_size() if d % 16 else 0


def _device_refusal(call: AttentionCall, name: str = _NAME) -> str | None:
    if call.q.device.type != "cpu":
        return device_refusal(name, call, range(8, 13))
    if not _env.triton_interpret():
        return "tensors are on cpu, where the kernels run only under TRITON_INTERPRET=1, in Triton's interpreter"
    if call.q.dtype == torch.bfloat16:
        return "Triton's interpreter multiplies bf16 as integers"
    return None


def _content_refusal(call: AttentionCall) -> str | None:
    if call.q.dtype not in _DTYPES:
        return f"dtype {call.q.dtype} is none of fp16, bf16, fp32"
    for tensors, dim in (("queries and keys", call.q.shape[3]), ("values", call.v.shape[3])):
        if dim > _LARGEST_HEAD_DIM:
            return f"head dim {dim} of {tensors} is over {_LARGEST_HEAD_DIM}"
    if call.score_bias is not None:
        return "it takes no score_bias"
    if call.mask is not None and call.cu_seqlens is not None:
        return "it takes a mask or cu_seqlens, not both"
    if not call.scale > 0:
        return f"scale {call.scale} is not above 0"
    return None
