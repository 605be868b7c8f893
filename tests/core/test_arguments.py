"""Checks of single arguments: what passes, what does not, and what the message says."""

from fractions import Fraction

import numpy as np
import pytest
import torch

from diffsynth.core.arguments import check_functions, check_integer, check_number, check_tensors


@pytest.mark.parametrize("value", [0, 1, 0.5, np.float32(0.5), np.int64(1), Fraction(1, 2)])
def test_numbers(value):
    assert check_number("scale", value, least=0, most=1) is value


@pytest.mark.parametrize(
    "value", [None, True, "0.5", [0.5], 1j, float("nan"), float("inf"), 10**400, -0.1, 1.1, torch.ones(()), object()]
)
def test_what_is_no_number_in_the_range(value):
    with pytest.raises(ValueError, match=r"scale=.*: expected a number from 0 to 1; 0 is off"):
        check_number("scale", value, least=0, most=1, note="0 is off")


@pytest.mark.parametrize(
    ("limits", "text"),
    [
        ({}, "a finite number$"),
        ({"least": 1}, "a finite number of at least 1$"),
        ({"above": 0, "most": 1}, "a number above 0 and at most 1$"),
        ({"above": -1, "below": 1}, "a number between -1 and 1$"),
    ],
)
def test_the_range_is_said(limits, text):
    with pytest.raises(ValueError, match=f"x='a': expected {text}"):
        check_number("x", "a", **limits)


def test_limits_are_included_or_not():
    for value, limits in ((0, {"above": 0}), (1, {"below": 1}), (-1e-9, {"least": 0}), (1.01, {"most": 1})):
        with pytest.raises(ValueError, match="x="):
            check_number("x", value, **limits)


@pytest.mark.parametrize("value", [1.0, "1", True, None, 0, 5, [1]])
def test_integers(value):
    assert check_integer("steps", np.int32(3), least=1, most=4) == 3
    with pytest.raises(ValueError, match=r"steps=.*: expected an integer from 1 to 4"):
        check_integer("steps", value, least=1, most=4)


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ([1.0, 0.5], r"sigmas is \[1.0, 0.5\], of type list; expected a floating-point tensor; torch.tensor\(sigmas\)"),
        (np.ones(2), "of type ndarray; expected a floating-point tensor; torch.from_numpy"),
        (torch.ones(2, dtype=torch.int64), r"sigmas is a tensor of torch.int64; .*sigmas.float\(\)"),
        ("a", "sigmas is 'a', of type str"),
    ],
)
def test_tensors(value, message):
    check_tensors(sigmas=torch.ones(2))
    with pytest.raises(TypeError, match=message):
        check_tensors(sigmas=value)


def test_functions():
    check_functions(velocity=print)
    with pytest.raises(TypeError, match="velocity=3: expected a function"):
        check_functions(velocity=3)
