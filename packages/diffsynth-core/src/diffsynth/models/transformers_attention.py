"""`attention()` inside networks of transformers, by the registry that transformers offers for it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import sdpa_mask

from diffsynth.core.attention import attention
from diffsynth.errors import Refused

_NAME = "diffsynth"


def attn_implementation() -> str:
    """The name under which a transformers config asks for our attention: `Qwen3Config(attn_implementation=...)`.

    It is added to transformers' list of implementations, beside its own, when it is first asked for.
    """
    if _NAME not in AttentionInterface._global_mapping:
        AttentionInterface.register(_NAME, _attend)
        AttentionMaskInterface.register(_NAME, sdpa_mask)
    return _NAME


def _attend(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    scaling: float | None = None,
    dropout: float = 0.0,
    is_causal: bool | None = None,
    **others: Any,
) -> tuple[Tensor, None]:
    """As transformers calls it, with `b n s d` tensors; gives `b s n d`.

    Without a mask the module's own `is_causal` counts, for more than one query, as with transformers' `sdpa`. A mask
    has everything in it. What would change the result and is not ours to do is refused.
    """
    if dropout:
        raise Refused(f"attention has no dropout, and {type(module).__name__} asks for {dropout}; call eval() first")
    for name in ("softcap", "s_aux", "position_bias", "cache"):
        if others.get(name) is not None:
            raise Refused(f"attention of {type(module).__name__} needs {name}=; take attn_implementation='eager'")
    causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
    is_alone = attention_mask is None
    window = others.get("sliding_window")
    is_bool = attention_mask is not None and attention_mask.dtype == torch.bool
    out = attention(
        *(tensor.transpose(1, 2) for tensor in (query, key, value)),
        mask=attention_mask if is_bool else None,
        score_bias=None if is_bool else attention_mask,
        causal=is_alone and causal and query.shape[2] > 1,
        window=(window - 1, 0) if is_alone and causal and window else None,
        scale=scaling,
    )
    return out, None
