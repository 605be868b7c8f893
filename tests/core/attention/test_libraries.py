"""Backends of libraries that cannot be installed here, with fakes that check arguments and attend as documented."""

from __future__ import annotations

import sys
import types
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from diffsynth.core.attention import attention
from diffsynth.core.attention.libraries import flash_attention, probing, sage, xformers
from diffsynth.errors import Refused

N, N_KV, D = 4, 2, 64


@pytest.fixture(autouse=True)
def _supported_device(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Tensors on the CPU pass for tensors on a GPU, and libraries are looked for again."""
    probing.clear_cache()
    for module in (flash_attention, sage, xformers):
        monkeypatch.setattr(module, "device_refusal", lambda *_, **__: None)
    yield
    probing.clear_cache()


@pytest.fixture
def provide(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Return a function that provides a module with these functions, as if it were installed."""

    def make(name: str, **content: Any) -> None:
        parts = name.split(".")
        for depth in range(1, len(parts) + 1):
            path = ".".join(parts[:depth])
            if path not in sys.modules:
                made = types.ModuleType(path)
                made.__spec__ = types.SimpleNamespace(name=path)  # type: ignore[assignment]
                made.__path__ = []
                monkeypatch.setitem(sys.modules, path, made)
        vars(sys.modules[name]).update(content)

    return make


def draw(q_len: int, k_len: int, *, dtype: torch.dtype = torch.bfloat16, n_kv: int = N_KV) -> tuple[Tensor, ...]:
    generator = torch.Generator().manual_seed(0)
    shapes = ((q_len, N), (k_len, n_kv), (k_len, n_kv))
    return tuple(torch.randn(1, *shape, D, generator=generator).to(dtype) for shape in shapes)


def offsets(*values: int) -> Tensor:
    return torch.tensor(values, dtype=torch.int32)


def flash(q: Tensor, k: Tensor, v: Tensor, softmax_scale: float, causal: bool, window_size: Any) -> Tensor:
    """Keys `[i + k_len - q_len - left, i + k_len - q_len + right]` of query `i`; causal bounds them on the right."""
    assert [x.shape[2:] for x in (q, k, v)] == [(N, D), (N_KV, D), (N_KV, D)], "expected b s n d"
    left, right = (-1 if side is None else side for side in window_size)
    i = torch.arange(q.shape[1])[:, None] + k.shape[1] - q.shape[1]
    j = torch.arange(k.shape[1])[None, :]
    mask = torch.ones(q.shape[1], k.shape[1], dtype=torch.bool)
    if left >= 0:
        mask &= j >= i - left
    if right >= 0 or causal:
        mask &= j <= i + (0 if causal else right)
    return attention(q, k, v, mask=mask[None, None], scale=softmax_scale, backend="naive")


def flash_attn_func(q, k, v, softmax_scale=None, causal=False, window_size=(-1, -1)):
    return flash(q, k, v, softmax_scale, causal, window_size)


def flash_attn_varlen_func(
    q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, softmax_scale=None, causal=False,
    window_size=(-1, -1),
):  # fmt: skip
    assert q.ndim == 3
    assert cu_seqlens_q.dtype == cu_seqlens_k.dtype == torch.int32
    assert (max_seqlen_q, max_seqlen_k) == (int(cu_seqlens_q.diff().max()), int(cu_seqlens_k.diff().max()))
    out = torch.zeros_like(q)
    for (q0, q1), (k0, k1) in zip(
        *(zip(cu.tolist(), cu.tolist()[1:], strict=False) for cu in (cu_seqlens_q, cu_seqlens_k)), strict=True
    ):
        if q1 > q0 and k1 > k0:
            out[q0:q1] = flash(q[None, q0:q1], k[None, k0:k1], v[None, k0:k1], softmax_scale, causal, window_size)[0]
    return out


def with_sums(function: Callable[..., Tensor]) -> Callable[..., tuple[Tensor, None]]:
    """Wrap a function as in version 4, which returns a pair and takes None for a window side without limit."""

    def flash_attention_4(
        q, k, v, *positional, softmax_scale=None, causal=False, window_size=(None, None),
        cu_seqlens_q=None, cu_seqlens_k=None, max_seqlen_q=None, max_seqlen_k=None,
    ):  # fmt: skip
        assert -1 not in window_size
        packed = (cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k) if cu_seqlens_q is not None else ()
        return function(q, k, v, *packed, softmax_scale=softmax_scale, causal=causal, window_size=window_size), None

    return flash_attention_4


FLASH = {
    "flash_attention_2": ("flash_attn", lambda function: function),
    "flash_attention_3": ("flash_attn_interface", lambda function: function),
    "flash_attention_4": ("flash_attn.cute", with_sums),
}
CALLS: dict[str, dict[str, Any]] = {
    "plain": {},
    "scale": {"scale": 0.3},
    "causal": {"causal": True},
    "window": {"window": (5, 2)},
    "left window": {"window": (5, -1)},
    "causal window": {"window": (5, 0), "causal": True},
    "packed": {"cu_seqlens": (offsets(0, 4, 9, 17), offsets(0, 6, 6, 23))},
    "packed and causal": {"cu_seqlens": (offsets(0, 4, 17), offsets(0, 6, 23)), "causal": True, "window": (3, 0)},
}


@pytest.mark.parametrize("name", FLASH)
@pytest.mark.parametrize("call", CALLS)
def test_flash_attention(name: str, call: str, provide: Callable[..., None]) -> None:
    module, answers = FLASH[name]
    provide(module, flash_attn_func=answers(flash_attn_func), flash_attn_varlen_func=answers(flash_attn_varlen_func))
    for sizes in ((17, 23), (23, 17)) if "cu_seqlens" not in CALLS[call] else ((17, 23),):
        q, k, v = draw(*sizes)
        found = attention(q, k, v, **CALLS[call], backend=name)
        torch.testing.assert_close(found, attention(q, k, v, **CALLS[call], backend="naive"), atol=2e-2, rtol=0)


def sageattn(q, k, v, tensor_layout="HND", is_causal=False, sm_scale=None):
    assert tensor_layout == "NHD"
    assert not is_causal or q.shape[1] == k.shape[1]
    return attention(q, k, v, causal=is_causal, scale=sm_scale, backend="naive")


def sageattn_varlen(
    q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, is_causal=False, sm_scale=None
):  # fmt: skip
    assert not is_causal
    return flash_attn_varlen_func(q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, sm_scale)


def test_sage_attention(provide: Callable[..., None]) -> None:
    provide("sageattention", sageattn=sageattn, sageattn_varlen=sageattn_varlen)
    packed = {"cu_seqlens": (offsets(0, 4, 17), offsets(0, 6, 23))}
    for sizes, call in [((17, 23), {"scale": 0.3}), ((17, 17), {"causal": True}), ((17, 23), packed)]:
        q, k, v = draw(*sizes)
        found = attention(q, k, v, **call, backend="sage_attention")
        torch.testing.assert_close(found, attention(q, k, v, **call, backend="naive"), atol=2e-2, rtol=0)


class Biases:
    """The used part of `xformers.ops.fmha.attn_bias`; each bias is the equivalent arguments of `attention()`."""

    class LowerTriangularFromBottomRightMask(dict):
        def __init__(self) -> None:
            super().__init__(causal=True)

    class LocalAttentionFromBottomRightMask(dict):
        def __init__(self, window_left: int, window_right: int) -> None:
            super().__init__(window=(window_left, window_right))

    class BlockDiagonalMask(dict):
        @classmethod
        def from_seqlens(cls, q_seqlen: list[int], kv_seqlen: list[int]) -> Biases.BlockDiagonalMask:
            pairs = (offsets(*torch.tensor([0, *lengths]).cumsum(0).tolist()) for lengths in (q_seqlen, kv_seqlen))
            return cls(cu_seqlens=tuple(pairs))

        def make_causal_from_bottomright(self) -> dict[str, Any]:
            return {**self, "causal": True}


def memory_efficient_attention(query, key, value, attn_bias=None, p=0.0, scale=None):
    grouped = query.ndim == 5
    if grouped:
        assert query.shape == (*query.shape[:2], N_KV, N // N_KV, D) and key.shape[2:] == query.shape[2:]  # noqa: PT018
        assert key.stride(3) == 0, "grouped keys are expanded, not copied"
        query, key, value = (x.flatten(2, 3) for x in (query, key, value))
    out = attention(query, key, value, scale=scale, **(attn_bias or {}), backend="naive")
    return out.unflatten(2, (N_KV, -1)) if grouped else out


@pytest.mark.parametrize("n_kv", [N_KV, N])
def test_xformers(n_kv: int, provide: Callable[..., None]) -> None:
    provide("xformers.ops", memory_efficient_attention=memory_efficient_attention)
    provide("xformers.ops.fmha.attn_bias", **vars(Biases))
    packed = (offsets(0, 4, 17), offsets(0, 6, 23))
    for call in [
        {"scale": 0.3},
        {"causal": True},
        {"window": (5, 2)},
        {"window": (5, -1)},
        {"window": (5, 0), "causal": True},
        {"cu_seqlens": packed},
        {"cu_seqlens": packed, "causal": True},
    ]:
        q, k, v = draw(17, 23, dtype=torch.float32, n_kv=n_kv)
        found = attention(q, k, v, **call, backend="xformers")
        torch.testing.assert_close(found, attention(q, k, v, **call, backend="naive"))


MASK = torch.ones(1, 1, 17, 23, dtype=torch.bool)
NOT_FOR = {
    "flash_attention_2": [
        ({"mask": MASK}, {}, "it takes no mask"),
        ({"score_bias": MASK.float()}, {}, "it takes no score_bias"),
        ({}, {"dtype": torch.float32}, "dtype torch.float32 is neither fp16 nor bf16"),
    ],
    "sage_attention": [
        ({"mask": MASK}, {}, "it takes no mask"),
        ({"window": (3, 3)}, {}, "it takes no window"),
        ({"score_bias": MASK.float()}, {}, "it takes no score_bias"),
        ({"causal": True}, {}, "causal over 17 queries and 23 keys: it aligns them at the first"),
        ({"cu_seqlens": (offsets(0, 4, 17), offsets(0, 0, 23))}, {}, "with queries but no keys"),
    ],
    "xformers": [
        ({"mask": MASK}, {}, "it takes no bool mask"),
        ({"score_bias": MASK.float()}, {}, "no score_bias"),
        ({"cu_seqlens": (offsets(0, 4, 17), offsets(0, 0, 23))}, {}, "a packed sample has queries without keys"),
        ({"cu_seqlens": (offsets(0, 17), offsets(0, 23)), "window": (1, 1)}, {}, "no window over packed samples"),
        ({}, {"dtype": torch.float64}, "dtype torch.float64 is none of fp16, bf16, fp32"),
    ],
}


@pytest.mark.parametrize(
    ("name", "call", "tensors", "reason"), [(name, *case) for name, cases in NOT_FOR.items() for case in cases]
)
def test_what_they_cannot_honour_is_refused(
    name: str, call: dict[str, Any], tensors: dict[str, Any], reason: str, provide: Callable[..., None]
) -> None:
    provide("flash_attn", flash_attn_func=flash_attn_func, flash_attn_varlen_func=flash_attn_varlen_func)
    provide("sageattention", sageattn=sageattn, sageattn_varlen=sageattn_varlen)
    provide("xformers.ops", memory_efficient_attention=memory_efficient_attention)
    with pytest.raises(Refused, match=reason):
        attention(*draw(17, 23, **tensors), **call, backend=name)


def test_heads_that_have_no_kernel(provide: Callable[..., None]) -> None:
    for name in ("flash_attn", "flash_attn_interface", "flash_attn.cute", "sageattention", "xformers"):
        provide(name)
    for name, dim, reason in [
        ("flash_attention_2", 12, "head dim 12 is not a multiple of 8 up to 256"),
        ("flash_attention_3", 264, "head dim 264 is not a multiple of 8 up to 256"),
        ("flash_attention_4", 256, "head dim 256 is not a multiple of 8 up to 128"),
        ("sage_attention", 32, "head dim 32 is none of 64, 96, 128"),
        ("xformers", 12, "head dims 12 and 12 are not multiples of 8"),
    ]:
        q = torch.zeros(1, 3, 2, dim, dtype=torch.bfloat16)
        with pytest.raises(Refused, match=reason):
            attention(q, q, q, backend=name)


def test_inference_only(provide: Callable[..., None]) -> None:
    provide("sageattention", sageattn=sageattn)
    provide("flash_attn.cute", flash_attn_func=with_sums(flash_attn_func))
    q, k, v = draw(17, 17)
    with pytest.raises(Refused, match="it has no gradients"):
        attention(q.requires_grad_(), k, v, backend="sage_attention")
    with pytest.raises(Refused, match="its gradients are not complete"):
        attention(q, k, v, backend="flash_attention_4")
    with torch.no_grad():
        attention(q, k, v, backend="sage_attention")


def test_a_library_that_is_not_there() -> None:
    for name, module in [("flash_attention_3", "flash_attn_interface"), ("sage_attention", "sageattention")]:
        with pytest.raises(Refused, match=f"'{name}' refuses this call: {module} is not installed"):
            attention(*draw(17, 23), backend=name)


def test_a_library_that_is_too_old(provide: Callable[..., None]) -> None:
    """FlashAttention before 2.3 has no windows, and would have been called without one."""

    def flash_attn_func(q, k, v, dropout_p=0.0, softmax_scale=None, causal=False):
        raise AssertionError

    provide("flash_attn", flash_attn_func=flash_attn_func)
    with pytest.raises(Refused, match=r"flash_attn.flash_attn_func of this version takes no window_size"):
        attention(*draw(17, 23), backend="flash_attention_2")


def test_a_library_that_cannot_be_imported(provide: Callable[..., None]) -> None:
    provide("flash_attn")
    with pytest.raises(Refused, match=r"flash_attn.flash_attn_func cannot be imported: AttributeError"):
        attention(*draw(17, 23), backend="flash_attention_2")


def test_looking_imports_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A package whose import fails, or takes long, is only imported when a call needs it."""
    (tmp_path / "broken_kernels" / "inner").mkdir(parents=True)
    (tmp_path / "broken_kernels" / "__init__.py").write_text("raise OSError('libcudart.so.11: cannot open')")
    (tmp_path / "broken_kernels" / "inner" / "__init__.py").write_text("")
    monkeypatch.syspath_prepend(tmp_path)
    assert probing.missing("broken_kernels.inner") is None
    assert probing.missing("broken_kernels.other") == "broken_kernels.other is not installed"
    assert "cannot be imported: OSError: libcudart" in str(probing.function_refusal("broken_kernels.inner", "attend"))


def test_compiled_code_sees_through_the_lookup(provide: Callable[..., None]) -> None:
    provide("flash_attn", flash_attn_func=flash_attn_func, flash_attn_varlen_func=flash_attn_varlen_func)
    compiled = torch.compile(
        lambda *x: attention(*x, causal=True, backend="flash_attention_2"), fullgraph=True, backend="eager"
    )
    q, k, v = draw(17, 23)
    torch.testing.assert_close(compiled(q, k, v), attention(q, k, v, causal=True, backend="flash_attention_2"))


def test_nothing_is_probed_before_it_is_needed(monkeypatch: pytest.MonkeyPatch) -> None:
    probed: list[str] = []

    class Finder:
        @staticmethod
        def find_spec(name: str, path: Any = None) -> Any:
            probed.append(name)

    monkeypatch.setattr(probing, "PathFinder", Finder)
    attention(*draw(17, 23))
    assert probed
    assert set(probed) <= {"flash_attn", "flash_attn.cute", "flash_attn_interface"}
    assert not {"flash_attn", "sageattention", "xformers"} & set(sys.modules)
