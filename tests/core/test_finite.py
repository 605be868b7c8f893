"""Checks for NaN and infinity: of every dtype, of samples of large tensors, and of steps."""

import pytest
import torch

from diffsynth.core.finite import SAMPLED_FROM, LateCheck, is_finite, nonfinite

FLOATS = [torch.float32, torch.float64, torch.bfloat16, torch.float16, torch.float8_e4m3fn, torch.float8_e5m2]


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_one_number_among_many(dtype, value):
    tensor = torch.linspace(-400, 400, 1001).to(dtype)
    assert is_finite(tensor)
    tensor[517] = value if dtype != torch.float8_e4m3fn else float("nan")  # it has no infinity
    assert not is_finite(tensor)
    assert not is_finite(torch.zeros(3), tensor)


def test_large_numbers_are_finite():
    assert is_finite(torch.tensor([3e38, 3e38, -3e38]), torch.full((9,), 65504.0).half())


def test_what_has_no_floating_numbers_is_finite():
    assert is_finite()
    assert is_finite(torch.zeros(0), torch.arange(3), torch.zeros(2, dtype=torch.bool))


def test_names_in_order():
    bad = torch.tensor([1.0, float("nan")])
    tensors = {"b": bad, "a": torch.ones(2), "c": bad.half(), "d": torch.empty(3, device="meta")}
    assert nonfinite(tensors) == ["b", "c"]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_large_tensors_in_host_memory_are_sampled(dtype):
    count = SAMPLED_FROM // dtype.itemsize
    diverged = torch.full((count,), float("nan"), dtype=dtype)
    assert nonfinite({"a": diverged}) == ["a"]
    one = torch.zeros(count, dtype=dtype)
    one[count // 64 + 3000] = float("nan")
    assert nonfinite({"a": one}) == []
    assert nonfinite({"a": one}, whole=True) == ["a"]
    assert nonfinite({"a": one[1:]}) == ["a"]  # below the limit: all of it


def test_on_the_cpu_a_step_is_known_at_once():
    check = LateCheck("cpu")
    assert check.add(0, torch.zeros(2)) is None
    assert check.add(1, torch.zeros(2), torch.tensor(float("inf"))) == 1
    assert check.finish() is None
    assert LateCheck("meta").add(0, torch.empty(2, device="meta")) is None
