"""Attention in one layout, `b s n d`, over interchangeable backends.

`attention()` is what networks call. A backend is an object with `refuses(call) -> str | None` and `__call__(call)`;
it either honours everything that the `AttentionCall` says, or it refuses with a reason. `naive` is the truth that the
others are tested against. Which one serves is said by the call, by `use_attention`, by the environment, or found out
from the call.
"""

from __future__ import annotations

from diffsynth.core.attention.builtin import register_builtin_backends
from diffsynth.core.attention.call import AttentionBackend, AttentionCall
from diffsynth.core.attention.choice import use_attention
from diffsynth.core.attention.forward import attention_forward
from diffsynth.core.attention.select import attention, available_backends, register_backend

__all__ = [
    "AttentionBackend",
    "AttentionCall",
    "attention",
    "attention_forward",
    "available_backends",
    "register_backend",
    "use_attention",
]

register_builtin_backends()
