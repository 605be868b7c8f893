"""Checks of the machine: Python, devices, attention backends and quantization methods."""

from __future__ import annotations

import os
import platform
import sys
from collections.abc import Iterator
from typing import TYPE_CHECKING

from diffsynth import _discovery, _env
from diffsynth.diagnosis.finding import Finding
from diffsynth.spec import resolve

if TYPE_CHECKING:
    from diffsynth.core.attention import AttentionCall

GIB = 2**30

_COMPILED_ON_FIRST_CALL = {"flex"}
"""Attention backends that are not called: compiling them takes longer than all other checks together."""


def python() -> Iterator[Finding]:
    """Yield two `Finding`s: the Python interpreter, and the operating system with its number of CPU cores."""
    yield Finding("python", "ok", f"{platform.python_version()} at {sys.executable}")
    yield Finding("system", "ok", f"{platform.platform()}, {os.cpu_count()} CPU cores")


def devices() -> Iterator[Finding]:
    """Yield a `Finding` per device: whether it multiplies matrices, its free memory; and one if only a CPU is found."""
    from diffsynth.core import device

    if device.get_device_type() == "cpu":
        built_for = " and ".join(device.built_for())
        reason = f"this torch is built for {built_for} and finds no device" if built_for else "this torch is CPU-only"
        yield Finding(
            "accelerator",
            "note",
            f"none ({reason}); computation runs on the CPU",
            "If the machine has one: install its driver, and a torch that is built for it",
        )
    for name in device.present_devices():
        yield check_device(name)


def attention() -> Iterator[Finding]:
    """Yield a `Finding` per attention backend, tried in a small bf16 call on the default device (flex: only asked
    whether it refuses the call), and at the end one for the backend in use.
    """
    from diffsynth.core.attention import available_backends
    from diffsynth.core.attention.registry import avoidance
    from diffsynth.core.attention.select import choose
    from diffsynth.errors import Refused
    from diffsynth.runtime.declared_backends import use_declared_backends

    use_declared_backends()
    call = _small_call()
    backends = available_backends()
    try:
        first = choose(call)
    except Refused:
        first = None
    why_not = {name: _why_unusable(name, call) for name in backends}
    for name in backends:
        if why_not[name]:
            yield Finding(name, "note", why_not[name], "Nothing, if another backend is usable; `auto` skips it")
        elif name == first:
            yield Finding(name, "ok", "usable; chosen by `auto`")
        else:
            reason = avoidance(name, call)
            yield Finding(name, "ok", f"usable if chosen by name: {reason}" if reason else "usable")
    yield _attention_in_use(first, why_not, call)


def _attention_in_use(first: str | None, why_not: dict[str, str], call: AttentionCall) -> Finding:
    wanted = _env.attention_implementation()
    if wanted != "auto":
        if reason := _why_unusable(wanted, call):
            return Finding(
                "in use",
                "broken",
                f"DIFFSYNTH_ATTENTION_IMPLEMENTATION={wanted}: {reason}",
                f"Set it to auto or to one of {', '.join(why_not)}; or: unset DIFFSYNTH_ATTENTION_IMPLEMENTATION",
            )
        return Finding("in use", "ok", f"{wanted}, by DIFFSYNTH_ATTENTION_IMPLEMENTATION")
    if first is None:
        return Finding("in use", "broken", "every backend refuses", "Run: pip install --force-reinstall torch")
    if why_not[first]:
        usable = ", ".join(name for name, reason in why_not.items() if not reason)
        action = f"Set DIFFSYNTH_ATTENTION_IMPLEMENTATION to one of {usable}, or uninstall the package of {first}"
        return Finding("in use", "broken", f"auto: {first}, but {why_not[first]}", action)
    return Finding("in use", "ok", f"auto: {first}; for a call that it refuses, the next usable one")


def quantization() -> Iterator[Finding]:
    """Yield a `Finding` per quantization method: whether it can be imported."""
    for one in _discovery.catalog().quantization:
        try:
            resolve(one.spec.backend)
        except Exception as error:  # a plugin's module may raise anything
            seen = f"from {one.distribution}: {type(error).__name__}: {error}"
            yield Finding(one.spec.name, "broken", seen, f"Run: pip install -U {one.distribution}", cause=error)
        else:
            yield Finding(one.spec.name, "ok", f"from {one.distribution} {one.version}")


def in_gib(count: float | None) -> str:
    """Return a number of bytes as text with one decimal, such as "1.5 GiB"; "an unknown amount" for None."""
    return "an unknown amount" if count is None else f"{count / GIB:.1f} GiB"


def check_device(name: str) -> Finding:
    """Multiply matrices on a device; return a `Finding`: its name and free memory, or that it does not compute."""
    import torch

    from diffsynth.core import device

    try:
        ones = torch.ones(8, 8, dtype=torch.bfloat16, device=name)
        if (ones @ ones).sum().item() != 512:
            raise RuntimeError("a matrix product is wrong")
        free, card = device.available_memory(name), device.card_name(name)
    except Exception as error:  # drivers raise exceptions of their own classes
        action = "Update the device's driver, or choose another with device="
        return Finding(name, "broken", f"does not compute: {type(error).__name__}: {error}", action, cause=error)
    return Finding(name, "ok", f"{card}, {in_gib(free)} of memory free")


def _small_call() -> AttentionCall:
    import torch

    from diffsynth.core import device
    from diffsynth.core.attention.call import checked_call

    q = torch.ones(1, 64, 2, 64, dtype=torch.bfloat16, device=device.default_device())
    return checked_call(q, q, q)


def _why_unusable(backend: str, call: AttentionCall) -> str:
    """Return why an attention backend cannot compute a call correctly, as text; "" if it can or is not tried."""
    import torch

    from diffsynth.core.attention.registry import refusal
    from diffsynth.core.attention.select import serve

    try:
        if reason := refusal(backend, call):
            return reason
        if backend in _COMPILED_ON_FIRST_CALL:
            return ""
        result = serve(call, backend)
    except Exception as error:  # libraries raise exceptions of their own classes
        return f"{type(error).__name__}: {' '.join(str(error).split())}"
    return "" if torch.allclose(result, call.q) else "its result is wrong"
