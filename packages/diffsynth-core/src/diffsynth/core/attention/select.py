"""Which backend serves a call. Adding one is `register_backend`; `builtin.py` adds ours."""

from __future__ import annotations

import logging

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from diffsynth import _env
from diffsynth.core.attention.call import AttentionBackend, AttentionCall
from diffsynth.core.attention.checking import CuSeqlens, check
from diffsynth.core.attention.choice import chosen
from diffsynth.core.attention.on_meta import Workspace, attend_on_meta
from diffsynth.errors import Refused, did_you_mean

_ALIASES = {"torch": "sdpa"}
_backends: dict[str, AttentionBackend] = {}
_priorities: dict[str, int] = {}
_workspaces: dict[str, Workspace] = {}
_told: set[tuple[str, str]] = set()
logger = logging.getLogger(__name__)


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
    """`softmax(scale * q k^T + score_bias) v` for each head, in the dtype of `q`.

    Under `torch.autocast` q, k and v are cast first, as torch's own attention casts them.

    Everything that is given is honoured together: a query may attend a key if all of `mask`, `causal`, `window` and
    `cu_seqlens` allow it. A query that may attend nothing gives zeros.

    Args:
        q: queries.
        k: keys; with fewer heads than `q`, each serves `n / n_kv` neighbouring query heads.
        v: values.
        mask: True = may attend.
        causal: query `i` may attend key `j` only if `j <= i'`, with `i' = i + (k_len - q_len)`.
        scale: None is `d ** -0.5`.
        window: (left, right): only if `i' - left <= j <= i' + right`; -1 is no limit. With `causal`, right is 0.
        cu_seqlens: int32 `(samples + 1,)` offsets of samples packed along the tokens of a batch of 1; a pair, of
            queries and of keys, where they differ. Tokens attend within their sample, in which `causal` and `window`
            count. On the CPU its values are checked, and some backends do better if they know them.
        score_bias: added to the scaled scores; the dtype of `q` or fp32.
        backend: a name of `available_backends()`, or `auto`; None asks `use_attention`, then
            DIFFSYNTH_ATTENTION_IMPLEMENTATION.

    Raises:
        Refused: the backend that was asked for by name cannot serve this call, or none can.
        ValueError: unknown backend, or arguments that do not fit together.
        TypeError: a mask that is not bool, a bias that is no float, offsets that are not int32.
    """
    q, k, v = _under_autocast(q, k, v)
    call = check(
        q, k, v, mask=mask, causal=causal, scale=scale, window=window, cu_seqlens=cu_seqlens, score_bias=score_bias
    )
    return serve(call, backend)


def _under_autocast(*tensors: Tensor) -> tuple[Tensor, ...]:
    # A linear layer answers in the lower dtype, a norm in fp32: so q and k come to differ from v.
    kind = tensors[0].device.type
    if tensors[0].is_meta or not torch.is_autocast_enabled(kind):  # torch refuses to say for meta
        return tensors
    dtype = torch.get_autocast_dtype(kind)
    return tuple(each if each.dtype == torch.float64 else each.to(dtype) for each in tensors)


def serve(call: AttentionCall, backend: str | None = None) -> Float[Tensor, "b q n d_v"]:
    """The result of a checked call; `backend` as in `attention()`, and so are the errors."""
    name = backend or chosen() or _env.attention_implementation()
    if name == "auto":
        return _attend(_backends[choose(call)], call)
    named = _named(name)
    # On meta, the device that a plan is meant for is not known: what was asked for by name is taken at its word.
    reason = None if call.q.is_meta else named.refuses(call)
    if reason is not None:
        raise Refused(
            f"attention backend {name!r} refuses this call: {reason} ({call.describe()}); "
            "ask for another one, or for 'auto'"
        )
    return _attend(named, call)


def _attend(backend: AttentionBackend, call: AttentionCall) -> Float[Tensor, "b q n d_v"]:
    # Without memory there is nothing to compute: a plan asks what it would take.
    return attend_on_meta(call, _workspace(backend)) if call.q.is_meta else backend(call)


def _workspace(backend: AttentionBackend) -> Workspace | None:
    declared = (_workspaces[name] for name, each in _backends.items() if each is backend and name in _workspaces)
    return next(declared, getattr(backend, "workspace", None))


def choose(call: AttentionCall) -> str:
    """What `auto` takes: the name of the first that neither refuses nor avoids the call, else that does not refuse it.

    Why one is passed over is logged, once for each backend and reason.

    Raises:
        Refused: all of them do; the message has every reason.
    """
    avoiding: str | None = None
    for name, backend in _backends.items():
        reason = backend.refuses(call)
        if reason is None:
            reason = _avoidance(backend, call)
            if reason is None:
                return name
            avoiding = avoiding or name
        if not torch.compiler.is_compiling():
            _tell(name, reason)
    if avoiding is not None:
        return avoiding
    reasons = "; ".join(f"{name}: {backend.refuses(call)}" for name, backend in _backends.items())
    raise Refused(f"every attention backend refuses this call ({call.describe()}): {reasons}")


def available_backends() -> tuple[str, ...]:
    """Names of the registered backends, in the order in which `auto` tries them."""
    return tuple(_backends)


def refusal(name: str, call: AttentionCall) -> str | None:
    """Why the backend of that name cannot serve a call, or None.

    Raises:
        ValueError: unknown backend.
    """
    return _named(name).refuses(call)


def avoidance(name: str, call: AttentionCall) -> str | None:
    """Why `auto` looks for another backend first, or None.

    Raises:
        ValueError: unknown backend.
    """
    return _avoidance(_named(name), call)


def register_backend(
    name: str, backend: AttentionBackend, *, priority: int = 0, workspace: Workspace | None = None
) -> None:
    """Make `backend` known as `name`; `auto` tries higher priorities first (`sdpa` has 0, `naive` -100).

    Args:
        workspace: what a plan counts for it; None is its own `workspace(call, device_type)`, if it has one.

    Raises:
        ValueError: the name is taken.
    """
    if name in _backends or name in _ALIASES or name == "auto":
        raise ValueError(f"attention backend {name!r} is already registered")
    _priorities[name] = priority
    if workspace is not None:
        _workspaces[name] = workspace
    _backends[name] = backend
    in_order = sorted(_backends.items(), key=lambda item: -_priorities[item[0]])
    _backends.clear()
    _backends.update(in_order)


def check_known(name: str) -> None:
    """Raise ValueError, with the nearest spelling, unless `name` is `auto` or a backend's."""
    if name != "auto":
        _named(name)


def _named(name: str) -> AttentionBackend:
    named = _backends.get(_ALIASES.get(name, name))
    if named is None:
        known = ("auto", *_backends, *_ALIASES)
        raise ValueError(
            f"attention backend {name!r} is unknown{did_you_mean(name, known)}; expected one of {', '.join(known)}"
        )
    return named


def _avoidance(backend: AttentionBackend, call: AttentionCall) -> str | None:
    avoids = getattr(backend, "avoids", None)
    return None if avoids is None else avoids(call)


def _tell(name: str, reason: str) -> None:
    if (name, reason) not in _told:
        _told.add((name, reason))
        logger.info("attention passes over %s: %s", name, reason)
