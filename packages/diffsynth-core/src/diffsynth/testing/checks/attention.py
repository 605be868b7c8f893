"""Checks of attention backends: compare each with `naive` at odd sizes; refusing a call with a reason is allowed."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from diffsynth.errors import Unavailable
from diffsynth.spec import AttentionSpec, resolve
from diffsynth.testing.checks.check import Check, Subject
from diffsynth.testing.checks.plugin import REFERENCES

if TYPE_CHECKING:
    import torch

    from diffsynth.core.attention import AttentionCall


@dataclass(frozen=True)
class _Case:
    """Options of a test call of 2 rows, 63 queries, 3 heads and 40 channels per head."""

    k_len: int = 63
    n_kv: int = 3
    is_masked: bool = False
    causal: bool = False
    scale: float = 40**-0.5
    window: tuple[int, int] | None = None
    is_packed: bool = False
    is_biased: bool = False


_CASES = {
    "a plain call": _Case(),
    "another number of keys": _Case(k_len=111),
    "grouped heads": _Case(n_kv=1),
    "a mask": _Case(k_len=111, is_masked=True),
    "the causal mask": _Case(k_len=111, causal=True),
    "a scale": _Case(scale=0.5),
    "a window": _Case(k_len=111, window=(9, 3)),
    "packed samples": _Case(k_len=111, is_packed=True),
    "a score bias": _Case(k_len=111, is_biased=True),
}
_TOLERANCES = {"float32": 1e-4, "bfloat16": 2e-2}


def checks(subject: Subject) -> Iterator[Check]:
    """Yield a `Check` (a named test, not yet run) for each attention backend of the plugin and each test case."""
    for fact in subject.declared("attention"):
        for name, case in _CASES.items():
            equal, title = (
                functools.partial(_equals_naive, fact, case),
                f"attention {fact.name} equals naive with {name}",
            )
            yield Check(title, equal, after=(REFERENCES,), runs_network=case != _Case())


def _equals_naive(fact: AttentionSpec, case: _Case) -> None:
    import torch

    from diffsynth.core.attention.naive import NaiveAttention

    backend, refusals = resolve(fact.backend), []
    for dtype, tolerance in _TOLERANCES.items():
        call = _call(case, getattr(torch, dtype))
        reason = backend.refuses(call)
        if reason is not None:
            assert isinstance(reason, str), f"refuses() returned {reason!r}; expected a reason as str, or None"
            assert reason, "refuses() returned an empty reason; expected a text, or None"
            refusals.append(f"{dtype}: {reason}")
            continue
        inputs = [tensor.clone() for tensor in (call.q, call.k, call.v)]
        output, expected = backend(call), NaiveAttention()(call)
        assert (output.shape, output.dtype) == (expected.shape, expected.dtype), (
            f"{dtype}: returned {output.dtype} {tuple(output.shape)}; expected {expected.dtype} {tuple(expected.shape)}"
        )
        error = (output.float() - expected.float()).abs().max().item()
        assert error <= tolerance, f"{dtype}: differs from naive by {error:.2g}; expected at most {tolerance:.2g}"
        assert all(map(torch.equal, inputs, (call.q, call.k, call.v))), f"{dtype}: the call changed its inputs"
    if len(refusals) == len(_TOLERANCES):
        raise Unavailable(f"{fact.name} refuses here: {'; '.join(refusals)}")


def _call(case: _Case, dtype: torch.dtype) -> AttentionCall:
    import torch

    from diffsynth.core import device as devices
    from diffsynth.core.attention.call import checked_call

    generator, device = torch.Generator().manual_seed(0), devices.default_device()
    batch = 1 if case.is_packed else 2

    def random(*shape: int) -> Any:
        return torch.randn(*shape, generator=generator).to(device, dtype)

    q, k, v = (
        random(batch, length, n, 40) for length, n in ((63, 3), (case.k_len, case.n_kv), (case.k_len, case.n_kv))
    )
    more: dict[str, Any] = {}
    mask = None
    if case.is_masked:
        mask = torch.rand(2, 1, 63, case.k_len, generator=generator) < 0.5
        mask[:, :, 5] = False  # a query with no allowed key must give zeros
        mask = mask.to(device)
    if case.is_packed:
        more["cu_seqlens"] = tuple(
            torch.tensor(offsets, dtype=torch.int32) for offsets in ((0, 20, 20, 63), (0, 31, 70, case.k_len))
        )
    if case.is_biased:
        more["score_bias"] = random(1, 3, 63, case.k_len)
    return checked_call(q, k, v, mask=mask, causal=case.causal, scale=case.scale, window=case.window, **more)
