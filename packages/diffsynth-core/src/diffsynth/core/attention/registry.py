"""The registry of attention backends: those of diffsynth, and those that plugins add by `register_backend`."""

from __future__ import annotations

import threading
from dataclasses import dataclass, field

from diffsynth.core.attention.call import AttentionBackend, AttentionCall
from diffsynth.core.attention.flex import FlexAttention
from diffsynth.core.attention.libraries.flash_attention import FLASH_ATTENTION_2, FLASH_ATTENTION_3, FLASH_ATTENTION_4
from diffsynth.core.attention.libraries.sage import SageAttention
from diffsynth.core.attention.libraries.xformers import XformersAttention
from diffsynth.core.attention.meta import Workspace
from diffsynth.core.attention.naive import NaiveAttention
from diffsynth.core.attention.sdpa import SdpaAttention
from diffsynth.core.attention.triton.backend import TritonAttention, TritonInt8Attention
from diffsynth.errors import did_you_mean, shown

ALIASES = {"torch": "sdpa"}
"""Other name -> name of a backend."""


@dataclass(frozen=True)
class RegisteredBackend:
    """A backend and the settings that it was registered with.

    Args:
        backend: the implementation.
        priority: `auto` tries higher priorities first.
        workspace: function for the bytes that it allocates beside inputs and output; None if unknown.
        logged_reasons: why `auto` did not take it, as far as that was logged.
    """

    backend: AttentionBackend
    priority: int
    workspace: Workspace | None
    logged_reasons: set[str] = field(default_factory=set)


BACKENDS: dict[str, RegisteredBackend] = {}
"""Name -> backend, in the order in which `auto` tries them."""

_lock = threading.Lock()


def register_backend(
    name: str, backend: AttentionBackend, *, priority: int = 0, workspace: Workspace | None = None
) -> None:
    """Register `backend` as `name`; `auto` tries higher priorities first (`sdpa` has 0, `naive` -100).

    Args:
        name: how users select it.
        backend: the implementation.
        priority: position in the order of `auto`; equal priorities are tried in order of registration.
        workspace: (call, device type) -> bytes that it allocates beside inputs and output, for memory planning; None
            uses `backend.workspace`, if there is one.

    Raises:
        ValueError: the name is taken.
    """
    with _lock:
        if name in BACKENDS or name in ALIASES or name == "auto":
            raise ValueError(f"attention backend {name!r} is already registered")
        later = [other for other, registered in BACKENDS.items() if registered.priority < priority]
        BACKENDS[name] = RegisteredBackend(backend, priority, workspace or getattr(backend, "workspace", None))
        for other in later:  # moved to the end one by one: calls in other threads read the dict
            BACKENDS[other] = BACKENDS.pop(other)


def unregister_backend(name: str) -> None:
    """Remove the backend that was registered as `name`.

    Raises:
        ValueError: unknown backend.
    """
    find_backend(name)
    with _lock:
        BACKENDS.pop(name, None)


def available_backends() -> tuple[str, ...]:
    """Return a tuple of the names of the registered backends, not aliases, in the order in which `auto` tries them."""
    return tuple(BACKENDS)


def find_backend(name: str) -> RegisteredBackend:
    """Return the `RegisteredBackend` (a backend and its settings) with this name or alias ("torch" is "sdpa"); raise
    ValueError if unknown.

    Raises:
        ValueError: unknown backend; the message has the nearest spelling.
        TypeError: `name` is no text.
    """
    if not isinstance(name, str):
        raise TypeError(f"attention backend {shown(name)}: expected a name such as 'sdpa'")
    found = BACKENDS.get(ALIASES.get(name, name))
    if found is None:
        with _lock:  # another thread may be changing the order
            found = BACKENDS.get(ALIASES.get(name, name))
    if found is None:
        known = ("auto", *BACKENDS, *ALIASES)
        raise ValueError(
            f"attention backend {name!r} is unknown{did_you_mean(name, known)}; expected one of {', '.join(known)}"
        )
    return found


def check_known(name: str) -> None:
    """Raise ValueError, which names the nearest spelling, unless `name` is "auto" or the name or alias of a registered
    backend.
    """
    if name != "auto":
        find_backend(name)


def refusal(name: str, call: AttentionCall) -> str | None:
    """Return a text, the reason why the backend with this name or alias cannot serve a call, or None if it can.

    Raises:
        ValueError: unknown backend.
    """
    return find_backend(name).backend.refuses(call)


def avoidance(name: str, call: AttentionCall) -> str | None:
    """Return a text, the reason why `auto` prefers other backends to the one with this name or alias, or None if it
    does not.

    Raises:
        ValueError: unknown backend.
    """
    avoids = getattr(find_backend(name).backend, "avoids", None)
    return None if avoids is None else avoids(call)


def _register_builtin_backends() -> None:
    # Whether an optional library is installed is checked when a backend is first considered, not here.
    register_backend("flash_attention_4", FLASH_ATTENTION_4)
    register_backend("flash_attention_3", FLASH_ATTENTION_3)
    register_backend("sdpa", SdpaAttention())
    register_backend("triton", TritonAttention(), priority=-5)
    register_backend("flash_attention_2", FLASH_ATTENTION_2, priority=-10)
    register_backend("xformers", XformersAttention(), priority=-20)
    register_backend("sage_attention", SageAttention(), priority=-30)
    register_backend("triton_int8", TritonInt8Attention(), priority=-40)
    register_backend("flex", FlexAttention(), priority=-80)
    for kernel in ("flash", "cudnn", "efficient", "math"):
        register_backend(f"sdpa_{kernel}", SdpaAttention(kernel), priority=-90)
    register_backend("naive", NaiveAttention(), priority=-100)


_register_builtin_backends()
