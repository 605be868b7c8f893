"""Attention over tensors `b s n d`, with interchangeable backends.

Networks call `attention()`. A backend is an object with `refuses(call) -> str | None` and `__call__(call)`: it honours
everything in the `AttentionCall`, or refuses the call with a reason. `naive` is the reference implementation that the
others are tested against. A backend is selected by the call, by `use_attention`, by the environment, or automatically.
"""

from __future__ import annotations

from diffsynth.core.attention.call import AttentionBackend, AttentionCall
from diffsynth.core.attention.forward import attention_forward
from diffsynth.core.attention.registry import available_backends, register_backend
from diffsynth.core.attention.select import attention, use_attention

__all__ = [
    "AttentionBackend",
    "AttentionCall",
    "attention",
    "attention_forward",
    "available_backends",
    "register_backend",
    "use_attention",
]
