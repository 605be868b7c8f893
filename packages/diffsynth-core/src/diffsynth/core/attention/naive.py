"""The reference implementation of attention: softmax over the whole score matrix, in fp32."""

from __future__ import annotations

import torch
from einops import rearrange
from jaxtyping import Float
from torch import Tensor

from diffsynth.core.attention.call import AttentionCall
from diffsynth.core.attention.meta import score_matrix_workspace


class NaiveAttention:
    """Reference backend, which holds the whole score matrix in fp32 (fp64 for fp64 inputs).

    It supports every option of `AttentionCall`. The other backends are tested against it.
    """

    def refuses(self, call: AttentionCall) -> str | None:
        """Return a text, the reason why the call is refused, if its dtype is not floating point; else None."""
        return None if call.q.is_floating_point() else f"dtype {call.q.dtype} is not floating point"

    def avoids(self, call: AttentionCall) -> str | None:
        """Return a text, never None, why `auto` prefers other backends for every call: this one holds the whole score
        matrix.
        """
        return "it holds the whole score matrix"

    def workspace(self, call: AttentionCall, device_type: str) -> int:
        """Return the backend's scratch memory for a call, in bytes: scores, their softmax and copies of q, k and v."""
        return score_matrix_workspace(call, dtype=torch.promote_types(call.q.dtype, torch.float32))

    def __call__(self, call: AttentionCall) -> Float[Tensor, "b q n d_v"]:
        """Return the attention output in the dtype of `call.q`."""
        precise = torch.promote_types(call.q.dtype, torch.float32)
        q, k, v = (rearrange(x, "b s n d -> b n s d").to(precise) for x in (call.q, call.k, call.v))
        if call.q_per_kv > 1:
            k, v = (x.repeat_interleave(call.q_per_kv, dim=1) for x in (k, v))
        scores = torch.einsum("bnqd,bnkd->bnqk", q, k) * call.scale
        if call.score_bias is not None:
            scores = scores + call.score_bias
        allowed = call.allowed()
        if allowed is not None:
            scores = scores.masked_fill(~allowed, -torch.inf)
        if allowed is None and call.score_bias is None:
            weights = scores.softmax(-1)
        else:
            # The softmax of a row of -inf is NaN: a query without an allowed key gets weights of 0 instead.
            is_empty = (scores == -torch.inf).all(-1, keepdim=True)
            weights = scores.masked_fill(is_empty, 0.0).softmax(-1).masked_fill(is_empty, 0.0)
        return rearrange(weights @ v, "b n q d -> b q n d").to(call.q.dtype)
