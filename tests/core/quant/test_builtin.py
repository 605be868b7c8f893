"""Weights in fp8 and int8 with scales, held to loops over their numbers."""

from __future__ import annotations

import math

import pytest
import torch

from diffsynth.core.quant.builtin import ScaledStorage
from diffsynth.core.quant.methods import method_of, methods

NAMES = [name for name in methods() if name.startswith(("fp8", "int8"))]
FP8_CODES = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn).float()
FP8_CODES = FP8_CODES[FP8_CODES.isfinite()].unique().tolist()


def nearest_code(value: float, codes: torch.dtype) -> float:
    """Return the code nearest to a number, of two equally near ones the even one."""
    if codes is torch.int8:
        return float(max(-127, min(127, round(value))))
    near = sorted(FP8_CODES, key=lambda code: abs(code - value))[:2]
    if abs(near[0] - value) == abs(near[1] - value):
        # The mantissa of an even code has its last bit unset.
        return next(
            code for code in near if code == 0 or (abs(code) / 2.0 ** (max(math.frexp(code)[1] - 1, -6) - 3)) % 2 == 0
        )
    return near[0]


def naive(method: ScaledStorage, weight: torch.Tensor) -> torch.Tensor:
    """Return the weight after storage, number by number."""
    outputs, inputs = weight.shape
    block = method.block
    groups: dict[tuple[int, ...], list[tuple[int, int]]] = {}
    for o in range(outputs):
        for i in range(inputs):
            key = {"tensor": (), "row": (o,), "block": (o, i // block)}[method.granularity]
            groups.setdefault(key, []).append((o, i))
    made = torch.empty(outputs, inputs)
    for members in groups.values():
        largest = max(abs(weight[at]) for at in members)
        scale = largest / torch.tensor(method.largest) if largest > 0 else torch.tensor(1.0)
        for at in members:
            made[at] = nearest_code((weight[at] / scale).item(), method.codes) * scale
    return made


@pytest.mark.parametrize("name", NAMES)
def test_equals_a_loop(name: str) -> None:
    method = method_of(name, {"block": 8} if name.endswith("block") else {})
    weight = torch.randn(6, 20, generator=torch.Generator().manual_seed(0))
    weight[2] = 0
    weight[3] *= 1e-5
    parts = method.quantize(weight)
    assert {part: (tuple(tensor.shape), tensor.dtype) for part, tensor in parts.items()} == {
        part: (info.shape, info.stored) for part, info in method.parts(6, 20).items()
    }
    assert not any(tensor.is_floating_point() for tensor in parts.values())
    assert torch.equal(method.dequantize(parts, torch.float32), naive(method, weight))
    assert torch.equal(method.dequantize(parts, torch.bfloat16), naive(method, weight).bfloat16())


@pytest.mark.parametrize("name", NAMES)
def test_the_error_is_within_the_stated_bound(name: str) -> None:
    method = method_of(name, {})
    weight = torch.randn(256, 512, generator=torch.Generator().manual_seed(1))
    error = (method.dequantize(method.quantize(weight), torch.float32) - weight).norm() / weight.norm()
    assert 0.4 * method.error < error <= method.error


@pytest.mark.parametrize("name", NAMES)
def test_what_is_stored_is_stored_again_as_it_is(name: str) -> None:
    """A second rounding changes nothing: the largest number of a group is a code, so the scales stay the same."""
    method = method_of(name, {})
    weight = torch.randn(8, 256, generator=torch.Generator().manual_seed(2))
    once = method.dequantize(method.quantize(weight), torch.float32)
    torch.testing.assert_close(method.dequantize(method.quantize(once), torch.float32), once, rtol=2e-7, atol=0)


@pytest.mark.parametrize("name", ["fp8_row", "int8_block"])
def test_stochastic_rounding_is_right_on_average(name: str) -> None:
    method = method_of(name, {})
    weight = torch.randn(2, 16, generator=torch.Generator().manual_seed(3))
    generator = torch.Generator().manual_seed(4)
    draws = [
        method.dequantize(method.quantize_stochastic(weight, torch.rand(2, 16, generator=generator)), torch.float32)
        for _ in range(2000)
    ]
    nearest = (method.dequantize(method.quantize(weight), torch.float32) - weight).abs()
    mean = (torch.stack(draws).mean(0) - weight).abs()
    assert mean.mean() < 0.1 * nearest.mean()
    spacing = torch.stack(draws).amax(0) - torch.stack(draws).amin(0)
    assert (nearest <= spacing / 2 * 1.001 + 1e-7).all()


def test_bad_options_are_refused() -> None:
    with pytest.raises(ValueError, match="codes=torch.float16"):
        ScaledStorage(torch.float16)
    with pytest.raises(ValueError, match="granularity='rows'"):
        ScaledStorage(torch.int8, "rows")
    with pytest.raises(ValueError, match="block=0: expected a number of inputs"):
        ScaledStorage(torch.int8, "block", 0)
