"""`triton_int8` is close to the reference, closer with the mean key subtracted, and never selected by `auto`."""

import pytest
import torch
from torch import Tensor
from torch.nn.functional import cosine_similarity

from diffsynth.core.attention import attention
from diffsynth.core.attention.call import checked_call
from diffsynth.core.attention.triton.backend import TritonInt8Attention
from diffsynth.core.attention.triton.int8 import quantize


def draw(*, bias: float = 0.0, d: int = 64) -> list[Tensor]:
    """Keys with a common vector, `bias` times a random one, as in real models."""
    q, k, v = torch.randn(1, 33, 2, d), torch.randn(1, 40, 1, d), torch.randn(1, 40, 1, d)
    return [x.half() for x in (q, k + bias * torch.randn(d), v)]


def errors(out: Tensor, tensors: list[Tensor], **arguments) -> tuple[float, float]:
    """Return cosine similarity and the mean error relative to the mean magnitude."""
    truth = attention(*(x.double() for x in tensors), **arguments, backend="naive")
    out = out.double()
    cosine = cosine_similarity(out.flatten(), truth.flatten(), dim=0)
    return float(cosine), float((out - truth).abs().sum() / truth.abs().sum())


@pytest.mark.parametrize(
    ("bias", "arguments"),
    [
        (6.0, {}),
        (0.0, {"causal": True, "scale": 0.2}),
        (6.0, {"mask": torch.arange(40)[None, None, None] < 25, "window": (20, 5)}),
    ],
)
def test_close_to_the_reference(bias, arguments):
    tensors = draw(bias=bias)
    cosine, relative = errors(attention(*tensors, **arguments, backend="triton_int8"), tensors, **arguments)
    assert cosine > 0.9998
    assert relative < 0.02


def test_head_dims_that_are_padded():
    tensors = draw(bias=6.0, d=60)
    cosine, _ = errors(attention(*tensors, backend="triton_int8"), tensors)
    assert cosine > 0.9998


def test_without_the_mean_key_the_error_is_worse(monkeypatch):
    tensors = draw(bias=30.0)
    _, with_it = errors(attention(*tensors, backend="triton_int8"), tensors)
    monkeypatch.setattr(Tensor, "mean", lambda x, *axes, **_: torch.zeros(x.shape[0], *x.shape[2:]))
    _, without = errors(attention(*tensors, backend="triton_int8"), tensors)
    assert without > 3 * with_it


def test_a_block_of_zeros_stays_zero():
    quantized, scales = quantize(torch.zeros(1, 40, 1, 16), None, 32)
    assert not quantized.any()
    assert scales.tolist() == [[[1.0, 1.0]]]


def test_quantising_loses_half_a_step_at_most():
    x = torch.randn(1, 40, 2, 24)
    quantized, scales = quantize(x, None, 32)
    back = quantized.float() * scales.repeat_interleave(32, dim=2)[:, :, :40].transpose(1, 2)[..., None]
    assert float((back - x).abs().max()) <= 0.5001 * float(scales.max())
    assert int(quantized.abs().max()) == 127


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda x: x.float(), "dtype torch.float32 is neither fp16 nor bf16"),
        (lambda x: x.requires_grad_(), "it has no gradients"),
    ],
)
def test_refusals(change, reason):
    assert TritonInt8Attention().refuses(checked_call(*map(change, draw()))) == reason


def test_packed_samples_are_refused():
    q = torch.zeros(1, 4, 1, 16, dtype=torch.float16)
    packed = torch.tensor([0, 4], dtype=torch.int32)
    assert TritonInt8Attention().refuses(checked_call(q, q, q, cu_seqlens=packed)) == "it takes no cu_seqlens"


def test_auto_never_takes_it():
    assert "inexact" in TritonInt8Attention().avoids(checked_call(*draw()))
