"""Our `attention()` as an attention implementation of transformers' models."""

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
    """Return the name "diffsynth", which selects our attention as `attn_implementation` of a transformers config.

    The first call registers it with transformers.
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
    position_bias: Tensor | None = None,
    **others: Any,
) -> tuple[Tensor, None]:
    """Return a tuple (attention output `b s n d`, None) for tensors `b n s d`, as transformers' attention functions do.

    Without a mask, attention is causal by the module's `is_causal` if there is more than one query, as in transformers'
    `sdpa`; a mask includes causality. `position_bias` is added to the scores. Options that our attention does not
    implement are refused.
    """
    if dropout:
        raise Refused(f"attention has no dropout, but {type(module).__name__} uses {dropout}; call eval() first")
    for name in ("softcap", "s_aux", "cache"):
        if others.get(name) is not None:
            raise Refused(f"attention of {type(module).__name__} needs {name}=; use attn_implementation='eager'")
    causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
    no_mask = attention_mask is None
    window = others.get("sliding_window")
    is_bool = attention_mask is not None and attention_mask.dtype == torch.bool
    biases = [each for each in (None if is_bool else attention_mask, position_bias) if each is not None]
    out = attention(
        *(tensor.transpose(1, 2) for tensor in (query, key, value)),
        mask=attention_mask if is_bool else None,
        score_bias=sum(biases[1:], biases[0]).to(query.dtype) if biases else None,
        causal=no_mask and causal and query.shape[2] > 1,
        window=(window - 1, 0) if no_mask and causal and window else None,
        scale=scaling,
    )
    return out, None
