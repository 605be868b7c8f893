"""Outputs and gradients of the kernels against the reference in fp64, at sizes that do not fit the blocks of 32.

`torch.empty` in library code is filled with NaN here, so that an element that no kernel writes fails the test.
"""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import parity
from diffsynth.core.attention import AttentionCall, attention
from diffsynth.core.attention.call import checked_call
from diffsynth.core.attention.naive import NaiveAttention
from diffsynth.core.attention.triton import op
from diffsynth.core.attention.triton.backend import TritonAttention
from diffsynth.core.attention.triton.tiles import aligned_rows

TOLERANCE = {torch.float32: 2e-6, torch.float16: 2e-3}


def draw(q_len, k_len, *, b=1, n=2, n_kv=2, d=16, d_v=None, dtype=torch.float32) -> list[Tensor]:
    sizes = ((q_len, n, d), (k_len, n_kv, d), (k_len, n_kv, d_v or d))
    return [torch.randn(b, *size).to(dtype) for size in sizes]


def draw_mask(*shape: int) -> Tensor:
    """Return a mask with a row without allowed keys, and with empty, full and partial blocks of 32 x 32."""
    mask = torch.rand(shape) < 0.6
    mask[..., 32:64] = False
    mask[..., 32:, :32] = True
    if shape[2] > 1:
        mask[..., 5, :] = False
    return mask


def compare(tensors: list[Tensor], *, d_out: Tensor | None = None, **arguments) -> None:
    """`tensors` need not be contiguous; their gradients are compared, too."""
    ours = [x.detach().requires_grad_() for x in tensors]
    truth = [x.detach().double().requires_grad_() for x in tensors]
    out = served(checked_call(*ours, **arguments))
    expected = NaiveAttention()(checked_call(*truth, **arguments))
    d_out = torch.randn(out.shape).to(out.dtype) if d_out is None else d_out
    out.backward(d_out)
    expected.backward(d_out.double())
    pairs = {"out": (out, expected)} | {
        name: (x.grad, y.grad) for name, x, y in zip(("dq", "dk", "dv"), ours, truth, strict=True)
    }
    for name, (got, wanted) in pairs.items():
        assert got.dtype == out.dtype
        # Gradients that cancel, as those of scores over one key do, are compared at the size of their terms.
        size = max(float(wanted.detach().abs().max()), 1.0)
        error = float((got.detach() - wanted.detach()).abs().max()) / size
        assert error <= TOLERANCE[out.dtype], f"{name} is off by {error:.1e}"


def served(call: AttentionCall) -> Tensor:
    assert TritonAttention().refuses(call) is None
    return TritonAttention()(call)


def test_kernels_get_rows_that_begin_at_multiples_of_16(monkeypatch):
    """Head dim 60 was loaded by scalar loads, which took so many registers that the kernels spilled."""
    seen, kernel_arguments = [], op.kernel_arguments
    monkeypatch.setattr(
        op, "kernel_arguments", lambda kernel, qkv, *rest: seen.extend(qkv) or kernel_arguments(kernel, qkv, *rest)
    )
    wide = torch.randn(1, 5, 2, 41)
    compare([wide[..., :32], wide[..., 9:], torch.randn(1, 5, 2, 12)])
    assert len(seen) == 9
    assert all(x.stride(3) == 1 and x.shape[3] % 16 == 0 for x in seen)
    assert all(stride % 16 == 0 for x in seen for stride in x.stride()[:3])


@pytest.mark.parametrize("shape", [(1, 1, 5, 41), (2, 1, 1, 41), (1, 2, 5, 1), (2, 2, 5, 48)])
def test_kernels_get_masks_whose_rows_begin_at_multiples_of_16(shape):
    """A mask of 41 keys was loaded byte by byte, which took so many registers that kernels spilled."""
    mask = torch.rand(shape) < 0.5
    for laid_out in (mask, mask.expand(2, 2, 5, shape[3]), mask.transpose(2, 3).contiguous().transpose(2, 3)):
        got = aligned_rows(laid_out)
        assert torch.equal(got[..., : shape[3]].expand(2, 2, 5, -1), laid_out.expand(2, 2, 5, -1))
        sizes = zip(got.shape[:3], got.stride(), strict=False)
        assert shape[3] == 1 or (got.stride(3) == 1 and all(size == 1 or stride % 16 == 0 for size, stride in sizes))


@pytest.mark.parametrize(
    ("q_len", "k_len", "heads"),
    [
        (1, 1, {"d": 64}),
        (1, 111, {"d": 96, "n": 1, "n_kv": 1}),
        (63, 111, {"b": 2, "d": 24, "d_v": 40}),
        (64, 64, {"d": 128, "n": 1, "n_kv": 1}),
        (111, 63, {"n": 4, "n_kv": 2}),
        (257, 5, {"n": 1, "n_kv": 1, "d": 8}),
        (40, 33, {"n": 3, "n_kv": 1, "d": 56}),
        (33, 40, {"d": 60, "n": 1, "n_kv": 1}),  # padded to 64; rows that are no multiple of 16 bytes
        (20, 33, {"d": 7, "d_v": 1, "n": 2, "n_kv": 1}),
    ],
)
def test_lengths_and_heads(q_len, k_len, heads):
    compare(draw(q_len, k_len, **heads), scale=0.3)


@pytest.mark.parametrize(
    ("q_len", "k_len", "limits"),
    [
        (63, 63, {"causal": True}),
        (63, 20, {"causal": True}),  # 43 queries precede the first key, and give zeros
        (20, 111, {"causal": True, "window": (30, 0)}),
        (111, 63, {"window": (5, 7)}),
        (70, 100, {"window": (0, -1)}),
        (70, 100, {"window": (-1, 40)}),
    ],
)
def test_positions(q_len, k_len, limits):
    compare(draw(q_len, k_len, n=2, n_kv=1), **limits)


@pytest.mark.parametrize(
    ("shape", "limits"),
    [
        ((2, 1, 63, 100), {}),
        ((1, 2, 63, 100), {"causal": True}),
        ((2, 1, 1, 100), {}),
        ((1, 1, 1, 100), {"window": (60, 5)}),
        ((1, 2, 63, 1), {}),
    ],
)
def test_masks(shape, limits):
    compare(draw(63, 100, b=shape[0], n_kv=2 if shape[1] == 2 else 1), mask=draw_mask(*shape), **limits)


def test_an_expanded_mask_is_one_for_all():
    compare(draw(33, 64, b=2), mask=draw_mask(1, 1, 33, 64).expand(2, 2, 33, 64))


@pytest.mark.parametrize("limits", [{}, {"causal": True}, {"window": (3, 2)}])
def test_packed_samples(limits):
    """One has no queries, one no keys, one a single pair."""
    of_q = torch.tensor([0, 5, 5, 40, 41, 63], dtype=torch.int32)
    of_k = torch.tensor([0, 0, 30, 90, 91, 111], dtype=torch.int32)
    compare(draw(63, 111, n_kv=1), cu_seqlens=(of_q, of_k), **limits)


def test_half_precision():
    compare(draw(63, 40, d=64, dtype=torch.float16), causal=True)


def test_a_query_without_keys_gives_zeros_and_no_gradient():
    q, k, v = (x.requires_grad_() for x in draw(37, 40))
    mask = torch.ones(1, 1, 37, 40, dtype=torch.bool)
    mask[..., 3, :] = False
    out = served(checked_call(q, k, v, mask=mask))
    out.square().sum().backward()
    assert not out[:, 3].any()
    assert not q.grad[:, 3].any()
    assert all(bool(x.grad.isfinite().all()) for x in (q, k, v))
    assert not served(checked_call(q, k, v, mask=torch.zeros_like(mask))).any()


def test_scores_far_from_zero_stay_finite():
    q, k, v = draw(33, 40)
    q[..., 0], k[:, :20, :, 0], k[:, 20:, :, 0] = 100.0, 100.0, -100.0
    call = checked_call(q.requires_grad_(), k, v, scale=1.0)
    out = served(call)
    out.sum().backward()
    assert bool(q.grad.isfinite().all())
    assert parity.relative_error(out, NaiveAttention()(call)) < 2e-3  # of scores near 10,000


def test_any_strides():
    """Heads before tokens, a head dim that is not dense, one head expanded; an incoming gradient of another layout."""
    q = torch.randn(2, 4, 40, 16).transpose(1, 2)
    k = torch.randn(2, 16, 33, 2).permute(0, 2, 3, 1)
    v = torch.randn(2, 33, 1, 16).expand(2, 33, 2, 16)
    compare([q, k, v], d_out=torch.randn(2, 4, 16, 40).permute(0, 3, 1, 2))


def test_gradients_repeat_bit_by_bit():
    first, second = (draw_and_differentiate() for _ in range(2))
    assert all(torch.equal(x, y) for x, y in zip(first, second, strict=True))


def draw_and_differentiate() -> list[Tensor]:
    torch.manual_seed(1)
    tensors = [x.requires_grad_() for x in draw(33, 40, n=2, n_kv=1)]
    served(checked_call(*tensors)).square().sum().backward()
    return [x.grad for x in tensors]


@st.composite
def calls(draw_one) -> tuple[dict[str, int], dict[str, object]]:
    q_len, k_len = (draw_one(st.integers(1, 50)) for _ in range(2))
    b, n_kv, group = (draw_one(st.integers(1, 2)) for _ in range(3))
    sizes = {
        "q_len": q_len,
        "k_len": k_len,
        "b": b,
        "n": n_kv * group,
        "n_kv": n_kv,
        "d": draw_one(st.integers(1, 24)),
    }
    arguments: dict[str, object] = {"causal": draw_one(st.booleans())}
    if not arguments["causal"] and draw_one(st.booleans()):
        arguments["window"] = (draw_one(st.integers(-1, 40)), draw_one(st.integers(-1, 40)))
    if draw_one(st.booleans()):
        full = (b, n_kv * group, q_len, k_len)
        shape = [size if draw_one(st.booleans()) else 1 for size in full]
        density = draw_one(st.sampled_from([0.05, 0.5, 1.0]))
        arguments["mask"] = torch.rand(shape, generator=torch.Generator().manual_seed(q_len)) < density
    return sizes, arguments


@settings(max_examples=5, deadline=None)
@given(calls())
def test_any_call(call):
    sizes, arguments = call
    compare(draw(**sizes), **arguments)


def test_through_the_dispatcher():
    q, k, v = draw(33, 40)
    with torch.inference_mode():
        out = attention(q, k, v, causal=True, backend="triton")
    assert parity.relative_error(out, attention(q, k, v, causal=True, backend="naive")) < 1e-5
