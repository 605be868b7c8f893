"""Without gradients some steps on large tensors overwrite memory of their own: no bit changes, and no argument."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from diffsynth.nn import gated_residual, geglu, modulate, rms_norm_rotary, swiglu
from diffsynth.nn.layer_norm import layer_norm
from diffsynth.nn.rms_norm import rms_norm

WIDTH, EPS = 128, 1e-6
TOKENS = 600

CALLS = {
    "modulate": lambda x, other, part: modulate(x, part, part),
    "gated_residual": lambda x, other, part: gated_residual(x, other, part),
    "rms_norm": lambda x, other, part: rms_norm(x, part[0, 0], eps=EPS, scale=part, residual=other, gate=part),
    "layer_norm": lambda x, other, part: layer_norm(x, eps=EPS, scale=part, shift=part),
    "rms_norm_rotary": lambda x, other, part: rms_norm_rotary(
        x[:, :, None], part[0, 0], other[:1, :, : WIDTH // 2].float(), other[:1, :, WIDTH // 2 :].float(), eps=EPS
    ),
    "swiglu": lambda x, other, part: swiglu(x, other),
    "geglu": lambda x, other, part: geglu(x, other),
}


def draw(*shape: int, dtype: torch.dtype) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape))).to(dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("parts", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", CALLS)
def test_bits_and_arguments(name, dtype, parts) -> None:
    given = [draw(2, TOKENS, WIDTH, dtype=dtype), draw(2, TOKENS, WIDTH, dtype=dtype), draw(2, 1, WIDTH, dtype=parts)]
    before = [tensor.clone() for tensor in given]
    with torch.enable_grad():
        expected = CALLS[name](*given)
    with torch.no_grad():
        found = CALLS[name](*given)
    assert found.dtype == expected.dtype
    assert torch.equal(found, expected)
    assert all(torch.equal(tensor, copy) for tensor, copy in zip(given, before, strict=True))


def test_one_tensor_for_a_batch_of_modulations() -> None:
    """The result has the batch of the modulation, so nothing is overwritten."""
    x, part = draw(1, TOKENS, WIDTH, dtype=torch.float32), draw(2, 1, WIDTH, dtype=torch.float32)
    with torch.no_grad():
        for call in (
            layer_norm(x, eps=EPS, scale=part, shift=part),
            modulate(x, part, part),
            gated_residual(x, x, part),
        ):
            assert call.shape == (2, TOKENS, WIDTH)
