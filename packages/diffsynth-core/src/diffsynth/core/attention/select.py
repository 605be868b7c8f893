"""Which backend serves a call. Adding one is `register_backend`; nothing here names a kernel's library."""

from __future__ import annotations

from jaxtyping import Bool, Float
from torch import Tensor

from diffsynth import _env
from diffsynth.core.attention.call import AttentionBackend, AttentionCall
from diffsynth.core.attention.checking import CuSeqlens, check
from diffsynth.core.attention.naive import NaiveAttention
from diffsynth.core.attention.sdpa import SdpaAttention
from diffsynth.errors import Refused, did_you_mean

_ALIASES = {"torch": "sdpa"}
_backends: dict[str, AttentionBackend] = {}
_priorities: dict[str, int] = {}


def attention(
    q: Float[Tensor, "b q n d"],
    k: Float[Tensor, "b k n_kv d"],
    v: Float[Tensor, "b k n_kv d_v"],
    *,
    mask: Bool[Tensor, "#b #n #q #k"] | None = None,
    causal: bool = False,
    scale: float | None = None,
    window: tuple[int, int] | None = None,
    cu_seqlens: CuSeqlens | None = None,
    score_bias: Float[Tensor, "#b #n #q #k"] | None = None,
    backend: str | None = None,
) -> Float[Tensor, "b q n d_v"]:
    """`softmax(scale * q k^T) v` for each head, in the dtype of `q`.

    Args:
        q: queries.
        k: keys; with fewer heads than `q`, each serves `n / n_kv` neighbouring query heads.
        v: values.
        mask: True = may attend. A query that may attend nothing gives zeros.
        causal: query `i` may attend key `j` only if `j <= i + (k_len - q_len)`.
        scale: None is `d ** -0.5`.
        backend: a name of `available_backends()`, or `auto`; None asks DIFFSYNTH_ATTENTION_IMPLEMENTATION.

    Raises:
        Refused: the backend that was asked for by name cannot serve this call, or none can.
        ValueError: unknown backend, or arguments that do not fit together.
        TypeError: a mask that is not bool.
    """
    call = check(
        q, k, v, mask=mask, causal=causal, scale=scale, window=window, cu_seqlens=cu_seqlens, score_bias=score_bias
    )
    name = _env.attention_implementation() if backend is None else backend
    if name == "auto":
        return _first_willing(call)(call)
    chosen = _named(name)
    reason = chosen.refuses(call)
    if reason is not None:
        raise Refused(f"attention backend {name!r} refuses this call: {reason}; ask for another one, or for 'auto'")
    return chosen(call)


def available_backends() -> tuple[str, ...]:
    """Names of the registered backends, in the order in which `auto` tries them."""
    return tuple(_backends)


def register_backend(name: str, backend: AttentionBackend, *, priority: int = 0) -> None:
    """Make `backend` known as `name`; `auto` tries higher priorities first (`sdpa` has 0, `naive` -100).

    Raises:
        ValueError: the name is taken.
    """
    if name in _backends or name in _ALIASES or name == "auto":
        raise ValueError(f"attention backend {name!r} is already registered")
    _priorities[name] = priority
    _backends[name] = backend
    in_order = sorted(_backends.items(), key=lambda item: -_priorities[item[0]])
    _backends.clear()
    _backends.update(in_order)


def _named(name: str) -> AttentionBackend:
    chosen = _backends.get(_ALIASES.get(name, name))
    if chosen is None:
        known = ("auto", *_backends, *_ALIASES)
        raise ValueError(
            f"attention backend {name!r} is unknown{did_you_mean(name, known)}; expected one of {', '.join(known)}"
        )
    return chosen


def _first_willing(call: AttentionCall) -> AttentionBackend:
    for backend in _backends.values():
        if backend.refuses(call) is None:
            return backend
    reasons = "; ".join(f"{name}: {backend.refuses(call)}" for name, backend in _backends.items())
    raise Refused(f"every attention backend refuses this call: {reasons}")


register_backend("sdpa", SdpaAttention())
register_backend("naive", NaiveAttention(), priority=-100)
