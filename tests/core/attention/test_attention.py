"""`sdpa` against the reference, the reference against a loop, and refusals."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor

import parity
from diffsynth.core import attention as package
from diffsynth.core.attention import attention
from diffsynth.errors import Refused


def draw(q_len: int, k_len: int, heads: int, kv_heads: int, dim: int = 13) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    return (
        torch.randn(2, q_len, heads, dim, generator=generator),
        torch.randn(2, k_len, kv_heads, dim, generator=generator),
        torch.randn(2, k_len, kv_heads, dim, generator=generator),
    )


def draw_mask(shape: tuple[int, ...]) -> Tensor:
    mask = torch.rand(shape, generator=torch.Generator().manual_seed(1)) < 0.7
    mask[..., 0, :] = False  # a query without allowed keys
    return mask


SIZES = [(63, 63), (37, 111), (111, 37), (1, 5)]
MASKS = [None, (2, 1, "q", "k"), (1, 1, 1, "k"), (2, 6, "q", "k")]


@pytest.mark.parametrize(("q_len", "k_len"), SIZES)
@pytest.mark.parametrize("kv_heads", [6, 2])
def test_sdpa_equals_naive(q_len: int, k_len: int, kv_heads: int) -> None:
    q, k, v = draw(q_len, k_len, 6, kv_heads)
    for axes, causal, scale in itertools.product(MASKS, (False, True), (None, 0.7)):
        shape = axes and tuple({"q": q_len, "k": k_len}.get(axis, axis) for axis in axes)
        mask = draw_mask(shape) if shape else None
        settings = {"mask": mask, "causal": causal, "scale": scale}
        truth = attention(q, k, v, **settings, backend="naive")
        if mask is not None and mask.shape[2] == 1:
            assert bool((truth == 0).all())
            assert float(attention(q, k, v, **settings, backend="sdpa").abs().max()) == 0.0
        else:
            assert parity.relative_error(attention(q, k, v, **settings, backend="sdpa"), truth) <= 1e-5


def test_naive_is_the_formula() -> None:
    q, k, v = draw(3, 5, 4, 2)
    mask = draw_mask((2, 1, 3, 5))
    got = attention(q, k, v, mask=mask, causal=True, scale=0.5, backend="naive")
    for b, i, n in itertools.product(range(2), range(3), range(4)):
        keys = [j for j in range(5) if mask[b, 0, i, j] and j <= i + 2]
        truth = torch.zeros(13)
        if keys:
            weights = torch.stack([(0.5 * (q[b, i, n] @ k[b, j, n // 2])).exp() for j in keys])
            truth = sum(w * v[b, j, n // 2] for w, j in zip(weights / weights.sum(), keys, strict=True))
        assert torch.allclose(got[b, i, n], truth, atol=1e-6)


@pytest.mark.parametrize("backend", ["naive", "sdpa"])
def test_a_query_without_keys_gives_zeros_and_finite_gradients(backend: str) -> None:
    q, k, v = (x.requires_grad_() for x in draw(7, 9, 2, 2))
    mask = torch.ones(2, 1, 7, 9, dtype=torch.bool)
    mask[:, :, 3] = False
    out = attention(q, k, v, mask=mask, backend=backend)
    assert bool((out[:, 3] == 0).all())
    out.square().sum().backward()
    assert all(bool(x.grad.isfinite().all()) for x in (q, k, v))


@pytest.mark.parametrize("backend", ["naive", "sdpa"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_the_dtype_of_the_queries_comes_back(backend: str, dtype: torch.dtype) -> None:
    q, k, v = draw(8, 8, 2, 2)
    truth = attention(q, k, v, backend="naive")
    got = attention(q.to(dtype), k.to(dtype), v.to(dtype), backend=backend)
    assert got.dtype == dtype
    assert parity.relative_error(got, truth) < 0.02


def test_sdpa_compiles_whole() -> None:
    q, k, v = draw(9, 9, 4, 2)
    mask = draw_mask((2, 1, 9, 9))
    compiled = torch.compile(lambda *x: attention(*x, mask=mask, scale=0.3), fullgraph=True, backend="eager")
    assert torch.equal(compiled(q, k, v), attention(q, k, v, mask=mask, scale=0.3))


def test_sdpa_refuses_what_it_has_no_kernel_for() -> None:
    q = torch.zeros(1, 2, 1, 4, dtype=torch.float8_e4m3fn)
    with pytest.raises(Refused, match=r"'sdpa' refuses this call: dtype torch.float8_e4m3fn"):
        attention(q, q, q, backend="sdpa")


def test_a_refusal_by_all_has_every_reason() -> None:
    q = torch.zeros(1, 2, 1, 4, dtype=torch.int32)
    with pytest.raises(Refused, match=r"sdpa: dtype torch.int32.*naive: dtype torch.int32"):
        attention(q, q, q, backend="auto")


def test_the_environment_chooses(monkeypatch: pytest.MonkeyPatch) -> None:
    q = torch.zeros(1, 2, 1, 4, dtype=torch.float8_e4m3fn)
    monkeypatch.setenv("DIFFSYNTH_ATTENTION_IMPLEMENTATION", "torch")
    with pytest.raises(Refused, match="'torch' refuses"):
        attention(q, q, q)


def test_a_refusal_shows_the_call() -> None:
    q = torch.zeros(1, 4, 2, 8)
    mask = torch.ones(1, 1, 4, 4, dtype=torch.bool)
    with pytest.raises(Refused, match=r"tensors are on cpu.*q \(1, 4, 2, 8\).*float32 on cpu, mask \(1, 1, 4, 4\)"):
        attention(q, q, q, mask=mask, backend="flash_attention_2")


@pytest.mark.parametrize(
    "name",
    ["flash_attention_2", "flash_attention_3", "flash_attention_4", "sage_attention", "xformers", "sdpa_cudnn"],
)
def test_tensors_on_the_cpu_for_a_backend_of_the_gpu(name: str) -> None:
    q = torch.zeros(1, 4, 2, 64, dtype=torch.bfloat16)
    with pytest.raises(Refused, match=f"'{name}' refuses this call: tensors are on cpu; {name} needs cuda"):
        attention(q, q, q, backend=name)


def test_public_names_are_sorted() -> None:
    assert package.__all__ == sorted(package.__all__)


def test_autocast_casts_what_layers_left_in_different_dtypes() -> None:
    q, k, v = (torch.randn(1, 5, 2, 8) for _ in range(3))
    with torch.autocast("cpu", torch.bfloat16):
        mixed = attention(q, k, v.bfloat16(), backend="naive")
        lowered = attention(q.bfloat16(), k.bfloat16(), v.bfloat16(), backend="naive")
    assert mixed.dtype == torch.bfloat16
    assert torch.equal(mixed, lowered)
