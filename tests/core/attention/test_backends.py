"""Every backend that runs on the CPU against the reference, in fp64, over all options of a call."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from diffsynth.core.attention import attention, chunks
from diffsynth.core.attention.call import checked_call
from diffsynth.core.attention.registry import refusal
from diffsynth.core.attention.sdpa import SdpaAttention

LENGTHS = st.sampled_from([1, 2, 5, 17, 63])


@st.composite
def calls(draw: Any, lengths: Any = LENGTHS) -> dict[str, Any]:
    """Arguments of `attention()`: any sizes, and any combination of masks, windows, packed samples and biases."""
    q_len, k_len = draw(lengths), draw(lengths)
    n_kv, per_kv = draw(st.sampled_from([1, 2])), draw(st.sampled_from([1, 3]))
    packed = draw(st.booleans())
    b = 1 if packed else draw(st.sampled_from([1, 2]))
    dim, dim_v = 8, draw(st.sampled_from([8, 5]))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 99)))

    def random(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    n = n_kv * per_kv
    arguments: dict[str, Any] = {
        "q": random(b, q_len, n, dim),
        "k": random(b, k_len, n_kv, dim),
        "v": random(b, k_len, n_kv, dim_v),
        "scale": draw(st.sampled_from([None, 0.7])),
        "causal": draw(st.booleans()),
    }
    left = draw(st.sampled_from([None, -1, 0, 3, 70]))
    if left is not None:
        arguments["window"] = (
            left,
            (0 if left >= 0 else -1) if arguments["causal"] else draw(st.sampled_from([-1, 0, 2])),
        )
    shape = tuple(draw(st.sampled_from([1, size])) for size in (b, n, q_len, k_len))
    if draw(st.booleans()):
        arguments["mask"] = torch.rand(shape, generator=generator) < draw(st.sampled_from([0.2, 0.8]))
    if draw(st.booleans()):
        arguments["score_bias"] = random(*shape)
    if packed:
        samples = draw(st.sampled_from([1, 2, 4]))
        arguments["cu_seqlens"] = tuple(
            torch.tensor(
                [0, *sorted(draw(st.lists(st.integers(0, size), min_size=samples - 1, max_size=samples - 1))), size]
            ).to(torch.int32)
            for size in (q_len, k_len)
        )
    return arguments


def formula(q: Tensor, k: Tensor, v: Tensor, *, scale: float | None, **rest: Any) -> Tensor:
    """Attention computed query by query: a second implementation, independent of `AttentionCall.allowed`."""
    out = q.new_zeros(q.shape[0], q.shape[1], q.shape[2], v.shape[3])
    cu_q, cu_k = rest.get("cu_seqlens") or (torch.tensor([0, q.shape[1]]), torch.tensor([0, k.shape[1]]))
    left, right = rest.get("window") or (-1, -1)
    mask, bias = (rest.get(name) for name in ("mask", "score_bias"))
    full = (q.shape[0], q.shape[2], q.shape[1], k.shape[1])
    mask = None if mask is None else mask.broadcast_to(full)
    bias = None if bias is None else bias.broadcast_to(full)
    for sample in range(len(cu_q) - 1):
        (q0, q1), (k0, k1) = ((int(cu[sample]), int(cu[sample + 1])) for cu in (cu_q, cu_k))
        for b in range(q.shape[0]):
            for n in range(q.shape[2]):
                of = n // (q.shape[2] // k.shape[2])
                for i in range(q0, q1):
                    aligned = (i - q0) + (k1 - k0) - (q1 - q0)
                    keys = [
                        j
                        for j in range(k0, k1)
                        if not (rest["causal"] and j - k0 > aligned)
                        and not (left >= 0 and j - k0 < aligned - left)
                        and not (right >= 0 and j - k0 > aligned + right)
                        and (mask is None or bool(mask[b, n, i, j]))
                    ]
                    if keys:
                        scores = k[b, keys, of] @ q[b, i, n] * (q.shape[3] ** -0.5 if scale is None else scale)
                        scores = scores if bias is None else scores + bias[b, n, i, keys]
                        out[b, i, n] = scores.softmax(0) @ v[b, keys, of]
    return out


@settings(max_examples=25, deadline=None)
@given(calls(lengths=st.sampled_from([1, 2, 5, 8])))
def test_naive_is_the_formula_entry_by_entry(arguments: dict[str, Any]) -> None:
    torch.testing.assert_close(attention(**arguments, backend="naive"), formula(**arguments), atol=1e-12, rtol=0)


@pytest.mark.parametrize("backend", ["sdpa", "sdpa_flash", "sdpa_math"])
@settings(max_examples=60, deadline=None)
@given(calls())
def test_equals_naive(backend: str, arguments: dict[str, Any]) -> None:
    if refusal(backend, checked_call(**arguments)) is None:
        truth = attention(**arguments, backend="naive")
        torch.testing.assert_close(attention(**arguments, backend=backend), truth, atol=1e-10, rtol=0)
    else:
        assert backend == "sdpa_flash"
        assert arguments["v"].shape != arguments["k"].shape


FLEX = {
    "all at once": {
        "window": (5, 2),
        "mask": (1, 1, 17, 21),
        "score_bias": (1, 4, 1, 21),
        "packed": True,
        "scale": 0.7,
    },
    "causal": {"causal": True, "mask": (1, 4, 17, 1), "score_bias": (1, 1, 17, 21)},
}
"""Few, because each is compiled."""


@pytest.mark.parametrize("name", FLEX)
def test_flex_equals_naive(name: str) -> None:
    arguments = dict(FLEX[name])
    if "mask" in arguments:
        arguments["mask"] = torch.rand(arguments["mask"]) < 0.7
    if "score_bias" in arguments:
        arguments["score_bias"] = torch.randn(arguments["score_bias"], dtype=torch.float64)
    if arguments.pop("packed", False):
        arguments["cu_seqlens"] = tuple(torch.tensor(x, dtype=torch.int32) for x in ([0, 4, 9, 17], [0, 6, 6, 21]))
    q, k, v = (torch.randn(1, *shape, dtype=torch.float64) for shape in ((17, 4, 8), (21, 2, 8), (21, 2, 5)))
    truth = attention(q, k, v, **arguments, backend="naive")
    torch.testing.assert_close(attention(q, k, v, **arguments, backend="flex"), truth, atol=1e-10, rtol=0)


@settings(max_examples=25, deadline=None)
@given(calls())
def test_gradients_of_sdpa_equal_those_of_naive(arguments: dict[str, Any]) -> None:
    found, truth = (gradients(arguments, backend) for backend in ("sdpa", "naive"))
    for one, other in zip(found, truth, strict=True):
        torch.testing.assert_close(one, other, atol=1e-10, rtol=0)


def gradients(arguments: dict[str, Any], backend: str) -> list[Tensor]:
    names = [name for name in ("q", "k", "v", "score_bias") if name in arguments]
    leaves = {name: arguments[name].clone().requires_grad_() for name in names}
    attention(**{**arguments, **leaves}, backend=backend).square().sum().backward()
    return [leaf.grad for leaf in leaves.values()]


@pytest.mark.parametrize(
    "settings_", [{"window": (40, 9)}, {"window": (5, -1)}, {"window": (300, 0)}, {"causal": True}]
)
@pytest.mark.parametrize(("q_len", "k_len"), [(600, 600), (600, 111), (300, 700)])
def test_long_windows_are_served_in_chunks(
    settings_: dict[str, Any], q_len: int, k_len: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No chunk has a mask of all queries and all keys, and rows at the borders of chunks are right."""
    monkeypatch.setattr(chunks, "CHUNK", 64)
    q, k, v = (torch.randn(1, size, 2, 4, dtype=torch.float64) for size in (q_len, k_len, k_len))
    mask = torch.rand(1, 2, 1, k_len) < 0.8
    call = checked_call(q, k, v, mask=mask, **settings_)
    cut = [chunk for _, chunk in chunks.by_window(call) if chunk is not None]
    assert sum(size for size, _ in chunks.by_window(call)) == q_len
    assert max(chunk.q_len * chunk.k_len for chunk in cut) < q_len * k_len
    truth = attention(q, k, v, mask=mask, **settings_, backend="naive")
    torch.testing.assert_close(attention(q, k, v, mask=mask, **settings_, backend="sdpa"), truth, atol=1e-10, rtol=0)


@pytest.mark.parametrize("backend", ["naive", "sdpa", "sdpa_math"])
def test_a_bias_that_leaves_nothing_gives_zeros(backend: str) -> None:
    q = torch.randn(1, 3, 2, 4)
    bias = torch.zeros(1, 1, 3, 3)
    bias[:, :, 1] = -torch.inf
    out = attention(q, q, q, score_bias=bias, backend=backend)
    assert bool((out[:, 1] == 0).all())
    assert bool((out[:, 0] != 0).all())


def test_a_bias_that_would_be_rounded_is_refused() -> None:
    q = torch.randn(1, 3, 2, 4, dtype=torch.bfloat16)
    call = checked_call(q, q, q, score_bias=torch.randn(1, 1, 3, 3))
    assert "would round score_bias from torch.float32 to torch.bfloat16" in str(refusal("sdpa", call))
    assert refusal("naive", call) is None


def test_offsets_that_only_the_device_knows() -> None:
    """With unknown offsets one mask covers all samples; with known ones each sample is served by its own call."""
    q = torch.randn(1, 9, 2, 4)
    cu = torch.tensor([0, 2, 2, 9], dtype=torch.int32)
    call = checked_call(q, q, q, cu_seqlens=cu, causal=True)
    assert call.offsets == ((0, 2, 2, 9), (0, 2, 2, 9))
    assert call.longest == (7, 7)
    unknown = replace(call, offsets=None)
    assert unknown.longest == (9, 9)
    torch.testing.assert_close(SdpaAttention()(unknown), SdpaAttention()(call))
