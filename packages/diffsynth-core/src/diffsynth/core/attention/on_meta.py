"""Attention over tensors without memory: an output of the right shape, and what the kernel would take.

Without this, attention on the meta device would be taken apart into matrix products, and whoever counts memory there
would count whole score matrices, which no kernel of ours holds.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from diffsynth.core.attention.call import AttentionBackend, AttentionCall
from diffsynth.core.attention.sdpa import SdpaAttention


@dataclass(frozen=True)
class MetaCall:
    """A call on the meta device, and the backend that would serve it.

    Args:
        call: the call.
        backend: that was chosen for it.
        out: `b q n d_v`, contiguous, as kernels give it.
    """

    call: AttentionCall
    backend: AttentionBackend
    out: Tensor

    def workspace(self, device_type: str) -> int:
        """Bytes that the backend takes beside its output; as much again as the output where it does not say."""
        declared = getattr(self.backend, "workspace", None)
        if declared is None:
            return self.out.numel() * self.out.element_size()
        return int(declared(self.call, device_type))

    @property
    def flops(self) -> int:
        """Floating-point operations of both matrix products, over all pairs of queries and keys."""
        b, q_len, n, d = self.call.q.shape
        return 2 * b * n * q_len * self.call.k.shape[1] * (d + self.call.v.shape[3])


_watcher: ContextVar[Callable[[MetaCall], None] | None] = ContextVar("diffsynth_attention_watcher", default=None)


@contextmanager
def watched(watcher: Callable[[MetaCall], None]) -> Iterator[None]:
    """Tell `watcher` of each call of `attention()` on the meta device."""
    token = _watcher.set(watcher)
    try:
        yield
    finally:
        _watcher.reset(token)


def attend_on_meta(call: AttentionCall, backend: AttentionBackend) -> Tensor:
    """What `backend` would give, without memory."""
    meta = _meta_call(call, backend)
    if (watcher := _watcher.get()) is not None:
        watcher(meta)
    return meta.out


def call_of_sdpa(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> MetaCall:
    """A direct call of `torch.nn.functional.scaled_dot_product_attention`, `b n s d`, as other libraries make it."""
    q, k, v = (x[(None,) * (4 - x.ndim)].transpose(1, 2) for x in (query, key, value))
    mask = None if attn_mask is None else attn_mask[(None,) * (4 - attn_mask.ndim)]
    is_bool = mask is not None and not mask.is_floating_point()
    call = AttentionCall(
        q,
        k,
        v,
        mask if is_bool else None,
        is_causal,
        query.shape[-1] ** -0.5 if scale is None else scale,
        score_bias=None if is_bool else mask,
    )
    return _meta_call(call, SdpaAttention())


def _meta_call(call: AttentionCall, backend: Any) -> MetaCall:
    b, q_len, n, _ = call.q.shape
    return MetaCall(call, backend, call.q.new_empty(b, q_len, n, call.v.shape[3]))
