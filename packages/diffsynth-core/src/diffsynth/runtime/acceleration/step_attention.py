"""Which attention backend serves which step: an inexact, fast one where it does little harm, an exact one elsewhere."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from dataclasses import MISSING, dataclass, fields
from typing import Any

import torch

from diffsynth.core.attention.call import AttentionCall
from diffsynth.core.attention.registry import check_known, refusal
from diffsynth.core.attention.select import use_attention
from diffsynth.errors import Refused
from diffsynth.runtime.acceleration.texts import settings_in
from diffsynth.runtime.declared_backends import use_declared_backends


@dataclass(frozen=True)
class StepAttention:
    """The attention backends of a call's networks, by step; given as its `attention`.

    The first steps lay out the picture and the last ones draw its details: errors of 8-bit scores show there most.

    Args:
        backend: of all steps but the first and last ones; a name of `available_backends()`, or `auto`.
        first: how many steps at the beginning `otherwise` serves, at least 0.
        last: how many at the end, at least 0.
        otherwise: the backend of those; `auto` takes no inexact one.

    Raises:
        ValueError: an unknown backend, or a number of steps out of range.
    """

    backend: str
    first: int = 0
    last: int = 0
    otherwise: str = "auto"

    def __post_init__(self) -> None:
        use_declared_backends()
        for name in (self.backend, self.otherwise):
            check_known(name)
        for name in ("first", "last"):
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < 0:
                raise ValueError(f"attention: {name}={value!r}: expected an integer of at least 0")

    def at(self, index: int, num_steps: int) -> str:
        """The backend of one step, 0 for the first."""
        is_within = self.first <= index < num_steps - self.last
        return self.backend if is_within else self.otherwise


AttentionArgument = StepAttention | str | None
"""What a call takes as `attention`."""


def parse_step_attention(value: Any) -> StepAttention | None:
    """The schedule that a text says, `backend` or `backend:first=2,last=2,otherwise=sdpa`; others pass as they are.

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
    return StepAttention(backend, **settings_in(rest, known, f"attention={value!r}"))


def attention_at(schedule: StepAttention | None, index: int, num_steps: int) -> AbstractContextManager[Any]:
    """The choice of one step's backend; without a schedule, none."""
    return nullcontext() if schedule is None else use_attention(schedule.at(index, num_steps))


def check_attention(schedule: StepAttention | None, device: torch.device, dtype: torch.dtype) -> None:
    """Raise before the first step if a backend is missing, or serves no tensors of this device and dtype.

    What a backend refuses of one layer's call only, that layer raises.

    Raises:
        Refused: see above.
    """
    if schedule is None or device.type == "meta":
        return
    q = torch.empty(1, 1, 1, 64, device=device, dtype=dtype)
    call = AttentionCall(q, q, q, mask=None, causal=False, scale=0.125)
    for name in (schedule.backend, schedule.otherwise):
        if name != "auto" and (reason := refusal(name, call)) is not None:
            raise Refused(f"attention={schedule!r} is refused: {name!r} cannot serve this pipeline: {reason}")
