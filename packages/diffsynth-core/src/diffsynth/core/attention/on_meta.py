"""Attention over tensors without memory: an output of the right shape, and what the kernel would take.

Without this, attention on the meta device would be taken apart into matrix products, and whoever counts memory there
would count whole score matrices, which no kernel of ours holds.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass

from torch import Tensor

from diffsynth.core.attention.call import AttentionCall
from diffsynth.core.attention.sdpa import SdpaAttention

Workspace = Callable[[AttentionCall, str], int]
"""(call, device type) -> bytes beside inputs and output."""


@dataclass(frozen=True)
class MetaCall:
    """A call on the meta device, and what the backend that would serve it takes.

    Args:
        call: the call.
        out: `b q n d_v`, contiguous, as kernels give it.
        declared: what the backend says that it takes, if it says anything.
    """

    call: AttentionCall
    out: Tensor
    declared: Workspace | None

    def workspace(self, device_type: str) -> int:
        """Bytes that the backend takes beside its output; as much again as the output where it does not say."""
        if self.declared is None:
            return self.out.numel() * self.out.element_size()
        return int(self.declared(self.call, device_type))

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


def attend_on_meta(call: AttentionCall, workspace: Workspace | None) -> Tensor:
    """The output of a backend that takes this workspace, without memory."""
    meta = _meta_call(call, workspace)
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
    return _meta_call(call, SdpaAttention().workspace)


def _meta_call(call: AttentionCall, workspace: Workspace | None) -> MetaCall:
    b, q_len, n, _ = call.q.shape
    return MetaCall(call, call.q.new_empty(b, q_len, n, call.v.shape[3]), workspace)
