"""The attention backend of each step: an exact one in the first and last steps, a fast inexact one between them."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from dataclasses import MISSING, dataclass, fields
from typing import Any

import torch

from diffsynth.core.arguments import check_integer
from diffsynth.core.attention.call import AttentionCall
from diffsynth.core.attention.registry import check_known, refusal
from diffsynth.core.attention.select import use_attention
from diffsynth.errors import Refused, shown
from diffsynth.runtime.acceleration.settings import parse_settings
from diffsynth.runtime.declared_backends import use_declared_backends


@dataclass(frozen=True)
class StepAttention:
    """The attention backends of a call's networks by step, for its argument `attention`.

    Errors of 8-bit scores are most visible in the first steps, which set the layout, and the last, which add details.

    Args:
        backend: of all steps but the first and last ones; a name of `available_backends()`, or `auto`.
        first: number of steps at the beginning that use `otherwise`, at least 0.
        last: number of steps at the end that use `otherwise`, at least 0.
        otherwise: the backend of those steps; `auto` chooses no inexact one.

    Raises:
        ValueError: an unknown backend, or a number of steps out of range.
        TypeError: a backend that is no name.
    """

    backend: str
    first: int = 0
    last: int = 0
    otherwise: str = "auto"

    def __post_init__(self) -> None:
        use_declared_backends()
        for field in ("backend", "otherwise"):
            if not isinstance(name := getattr(self, field), str):
                raise TypeError(f"attention: {field}={shown(name)}: expected a name such as 'sdpa'")
            check_known(name)
        for name in ("first", "last"):
            check_integer(f"attention: {name}", getattr(self, name), least=0)

    def at(self, index: int, num_steps: int) -> str:
        """Return the attention backend's name for step `index` (from 0): `otherwise` in the first `first` and the
        last `last` steps, else `backend`.
        """
        is_within = self.first <= index < num_steps - self.last
        return self.backend if is_within else self.otherwise


AttentionArgument = StepAttention | str | None
"""The type of a call's argument `attention`."""


def parse_step_attention(value: Any) -> StepAttention | None:
    """Return `value` as a `StepAttention`: a text such as "triton_int8:first=2,last=2" is parsed; None stays None.

    Raises:
        ValueError: an unknown backend or setting, or a number out of range.
        TypeError: neither a text nor a `StepAttention`.
    """
    if value is None or isinstance(value, StepAttention):
        return value
    if not isinstance(value, str):
        raise TypeError(
            f"attention={value!r}: expected a StepAttention, a text such as 'triton_int8:first=2,last=2', or None"
        )
    backend, _, rest = value.partition(":")
    known = [each.name for each in fields(StepAttention) if each.default is not MISSING]
    return StepAttention(backend, **parse_settings(rest, known, argument=f"attention={value!r}"))


def attention_at(schedule: StepAttention | None, index: int, num_steps: int) -> AbstractContextManager[Any]:
    """Return a context manager that sets the attention backend of a step; without a schedule it does nothing."""
    return nullcontext() if schedule is None else use_attention(schedule.at(index, num_steps))


def check_attention(schedule: StepAttention | None, device: torch.device, dtype: torch.dtype) -> None:
    """Raise Refused unless each backend that a schedule names can serve the device and dtype; None, "auto" and the
    device "meta" are not checked.

    A backend that refuses the shape of a layer's call raises in that layer.

    Raises:
        Refused: a backend is not available, or refuses the device or the dtype.
    """
    if schedule is None or device.type == "meta":
        return
    q = torch.empty(1, 1, 1, 64, device=device, dtype=dtype)
    call = AttentionCall(q, q, q, mask=None, causal=False, scale=0.125)
    for name in (schedule.backend, schedule.otherwise):
        if name != "auto" and (reason := refusal(name, call)) is not None:
            raise Refused(f"attention={schedule!r} is refused: {name!r} cannot serve this pipeline: {reason}")
