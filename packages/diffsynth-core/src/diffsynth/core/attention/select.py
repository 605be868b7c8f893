"""`attention()`, and the selection of the backend that serves a call.

In order of precedence: the argument `backend`, `use_attention`, the environment variable
DIFFSYNTH_ATTENTION_IMPLEMENTATION, and `auto`. `use_attention` changes no global state.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from types import TracebackType
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from diffsynth import _env
from diffsynth.core.attention.call import AttentionCall, CuSeqlens, checked_call
from diffsynth.core.attention.meta import attend_on_meta
from diffsynth.core.attention.registry import ALIASES, BACKENDS, RegisteredBackend, avoidance, check_known, find_backend
from diffsynth.errors import Refused
from diffsynth.terminal import module_logger

logger = module_logger(__name__)


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
    """Return the attention output `b q n d_v`: for each head `softmax(scale * q k^T + score_bias) v` over the keys that
    a query may attend, in the dtype of `q`.

    Under `torch.autocast` q, k and v are cast first, as in `F.scaled_dot_product_attention`.

    All restrictions apply together: a query may attend a key if `mask`, `causal`, `window` and `cu_seqlens` all allow
    it. A query without an allowed key gives zeros.

    Args:
        q: queries.
        k: keys; with fewer heads than `q`, each key head serves `n / n_kv` neighbouring query heads.
        v: values.
        mask: True = may attend.
        causal: query `i` may attend key `j` only if `j <= i'`, with `i' = i + (k_len - q_len)`.
        scale: factor on the scores; None is `d ** -0.5`.
        window: (left, right): query `i` may attend key `j` only if `i' - left <= j <= i' + right`; -1 is no limit. With
            `causal`, right is 0.
        cu_seqlens: int32 `(samples + 1,)` offsets of samples packed along the tokens of a batch of 1; a pair (queries,
            keys) if they differ. Tokens attend within their sample; `causal` and `window` apply within it. Offsets on
            the CPU are checked, and let some backends serve the samples one by one.
        score_bias: added to the scaled scores; the dtype of `q` or fp32.
        backend: a name of `available_backends()`, or `auto`; None is the choice of `use_attention`, else of
            DIFFSYNTH_ATTENTION_IMPLEMENTATION.

    Raises:
        Refused: the selected backend cannot serve this call, or, with `auto`, no backend can.
        ValueError: unknown backend, or arguments that do not fit together.
        TypeError: a mask that is not bool, a bias that is not floating point, offsets that are not int32.
    """
    # Under autocast a linear layer returns the lower dtype and a norm fp32, so q and k differ from v.
    q, k, v = _cast_by_autocast(q, k, v)
    call = checked_call(
        q, k, v, mask=mask, causal=causal, scale=scale, window=window, cu_seqlens=cu_seqlens, score_bias=score_bias
    )
    return serve(call, backend)


def _cast_by_autocast(*tensors: Tensor) -> tuple[Tensor, ...]:
    kind = tensors[0].device.type
    if tensors[0].is_meta or not torch.is_autocast_enabled(kind):  # torch raises for the meta device
        return tensors
    dtype = torch.get_autocast_dtype(kind)
    return tuple(each if each.dtype == torch.float64 else each.to(dtype) for each in tensors)


def serve(call: AttentionCall, backend: str | None = None) -> Float[Tensor, "b q n d_v"]:
    """Return the attention output `b q n d_v` of an `AttentionCall`; `backend` (a name or None) and errors are those of
    `attention()`.
    """
    name = backend or chosen_backend() or _env.attention_implementation()
    if name == "auto":
        name = choose(call)
        return _attend(name, BACKENDS[name], call)
    registered = find_backend(name)
    # Tensors on meta do not tell on which device the call will run, so a backend selected by name is not checked.
    reason = None if call.q.is_meta else registered.backend.refuses(call)
    if reason is not None:
        raise Refused(
            f"attention backend {name!r} refuses this call: {reason} ({call.describe()}); select another one, or 'auto'"
        )
    return _attend(ALIASES.get(name, name), registered, call)


def _attend(name: str, registered: RegisteredBackend, call: AttentionCall) -> Float[Tensor, "b q n d_v"]:
    if call.q.is_meta:
        return attend_on_meta(call, registered.workspace)
    # Compiled code, in which a ContextVar may break the graph, does not record what serves it.
    if not torch.compiler.is_compiling() and (served := _served.get()) is not None:
        served.add(name)
    return registered.backend(call)


_served: ContextVar[set[str] | None] = ContextVar("diffsynth_attention_served", default=None)


@contextmanager
def served_backends() -> Iterator[set[str]]:
    """Context manager whose value is a set of the names of the backends that serve calls of `attention()` in it, in
    this thread or task; compiled code is not seen.
    """
    outer, served = _served.get(), set[str]()
    token = _served.set(served)
    try:
        yield served
    finally:
        _served.reset(token)
        if outer is not None:
            outer |= served


def choose(call: AttentionCall) -> str:
    """Return the name of the first backend, in order of priority, that neither refuses nor avoids the call, else of the
    first that does not refuse it.

    Why a backend is not selected is logged, once for each backend and reason.

    Raises:
        Refused: every backend refuses the call; the message has all reasons.
    """
    avoiding: str | None = None
    for name, registered in tuple(BACKENDS.items()):  # a plugin may be registered meanwhile
        reason = registered.backend.refuses(call)
        if reason is None:
            reason = avoidance(name, call)
            if reason is None:
                return name
            avoiding = avoiding or name
        if not torch.compiler.is_compiling() and reason not in registered.logged_reasons:
            registered.logged_reasons.add(reason)
            logger.info("attention does not use %s: %s", name, reason)
    if avoiding is not None:
        return avoiding
    reasons = "; ".join(f"{name}: {registered.backend.refuses(call)}" for name, registered in BACKENDS.items())
    raise Refused(f"every attention backend refuses this call ({call.describe()}): {reasons}")


_choices: ContextVar[tuple[tuple[int, str], ...]] = ContextVar("diffsynth_attention", default=())
"""(id of the `use_attention`, backend) of the choices in force in this thread or task; the innermost is last."""

_innermost: ContextVar[str | None] = ContextVar("diffsynth_attention_name", default=None)
"""The backend of the innermost choice. Compiled code guards on this name alone, so it serves later choices of it."""


class _ThreadChoice(threading.local):
    def __init__(self) -> None:
        self.innermost: str | None = None


_thread_choice = _ThreadChoice()
"""The innermost choice by thread, for compiled code of torch before 2.15, where reading a ContextVar breaks graphs."""

CAN_TRACE_CONTEXTVARS = torch.__version__ >= (2, 15)
"""Whether torch.compile can trace the reading of a ContextVar."""

_is_used = False
"""Whether a `use_attention` was ever made. Until then compiled code does not read the context."""


class use_attention:  # noqa: N801 - it is used like a function
    """Select the backend of `attention()` calls without `backend=`, in a `with` block or in the forward of a module.

        with use_attention("naive"):
            image = pipe(prompt)

        choice = use_attention("sdpa", module=pipe.vae)  # for every later call of the module
        choice.remove()

    The innermost choice has precedence. `backend=` of a call precedes it; it precedes
    DIFFSYNTH_ATTENTION_IMPLEMENTATION. A choice for a `with` block holds in the thread or task that made it (in code
    compiled by torch before 2.15, in the thread); a choice for a module holds in every thread that calls the module.

    Args:
        backend: a name of `available_backends()`, or `auto`.
        module: select for the forward of this module, including its submodules, from now until `remove()` or the end
            of the `with` block. Calls elsewhere in the program are not affected.

    Raises:
        ValueError: unknown backend, or the same object entered twice at the same time.
    """

    def __init__(self, backend: str, *, module: nn.Module | None = None) -> None:
        check_known(backend)
        global _is_used
        _is_used = True
        self._entry = (id(self), backend)
        self._is_entered = False
        self._hooks: list[Any] = []
        if module is not None:
            # always_call runs the hook even if forward raises.
            self._hooks = [
                module.register_forward_pre_hook(lambda *_: self._begin()),
                module.register_forward_hook(lambda *_: self._end(), always_call=True),
            ]
        self._is_for_module = module is not None

    def remove(self) -> None:
        """Remove the module's hooks, which ends this choice of a backend for it; without hooks (no module, or removed
        before) nothing happens.
        """
        for hook in self._hooks:
            hook.remove()
        self._hooks = []

    def __enter__(self) -> use_attention:
        if self._is_entered:
            raise ValueError(f"use_attention({self._entry[1]!r}) is already entered; create another one")
        self._is_entered = True
        if not self._is_for_module:
            self._begin()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._is_entered = False
        if self._is_for_module:
            self.remove()
        else:
            self._end()

    def _begin(self) -> None:
        _set_choices((*_choices.get(), self._entry))

    def _end(self) -> None:
        # If another pre-hook raised before ours ran, this choice never began.
        entries = _choices.get()
        if entries and entries[-1] == self._entry:
            _set_choices(entries[:-1])


class restored_choice:  # noqa: N801
    """Context manager that restores the `use_attention` choices that were in force when it was created.

    For work that runs later or in another thread, such as the recomputation of a checkpointed block in the backward
    pass.
    """

    def __init__(self) -> None:
        self._entries = _choices.get()

    def __enter__(self) -> None:
        self._before = _choices.get()
        _set_choices(self._entries)

    def __exit__(self, *_: object) -> None:
        _set_choices(self._before)


def chosen_backend() -> str | None:
    """Return the name of the backend ("auto" included) that the innermost `use_attention` of this thread or task
    selects; None without one.
    """
    if not _is_used:
        return None
    return _innermost.get() if CAN_TRACE_CONTEXTVARS or not torch.compiler.is_compiling() else _thread_choice.innermost


def _set_choices(entries: tuple[tuple[int, str], ...]) -> None:
    name = entries[-1][1] if entries else None
    _choices.set(entries)
    _innermost.set(name)
    _thread_choice.innermost = name
