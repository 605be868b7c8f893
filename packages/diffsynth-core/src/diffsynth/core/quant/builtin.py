"""Methods that need no other library: weights in fp8 or int8 with scales, computation in the dtype of the input."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from diffsynth.core.quant.method import PartInfo, Parts, QuantMethod

Granularity = Literal["tensor", "row", "block"]
GRANULARITIES = ("tensor", "row", "block")

SMALLEST_FP8 = -6
"""Exponent of the smallest normal number of float8_e4m3fn."""


@dataclass(frozen=True)
class ScaledStorage(QuantMethod):
    """Weights as codes of 8 bits times fp32 scales: one of the whole weight, one of each output, or one of each block
    of consecutive inputs of an output.

    In files the parts are `weight` and `weight_scale`, of shapes `o i` and ``, `o 1` or `o blocks`; with one scale of
    the whole weight that is the form in which other programs store scaled fp8.

    Args:
        codes: dtype of the codes, float8_e4m3fn or int8.
        granularity: of the scales: "tensor", "row" or "block".
        block: inputs in a block, at least 1.

    Raises:
        ValueError: another dtype or granularity, or a block of no inputs.
    """

    codes: torch.dtype
    granularity: Granularity = "row"
    block: int = 128
    error: float = field(default=0.0, init=False, compare=False)

    def __post_init__(self) -> None:
        if self.codes not in (torch.float8_e4m3fn, torch.int8):
            raise ValueError(f"codes={self.codes}: expected torch.float8_e4m3fn or torch.int8")
        if self.granularity not in GRANULARITIES:
            raise ValueError(f"granularity={self.granularity!r}: expected one of {', '.join(GRANULARITIES)}")
        if isinstance(self.block, bool) or not isinstance(self.block, int) or self.block < 1:
            raise ValueError(f"block={self.block!r}: expected a number of inputs of at least 1")
        bounds = {"tensor": 0.025, "row": 0.015, "block": 0.010}
        object.__setattr__(self, "error", 0.030 if self.codes is torch.float8_e4m3fn else bounds[self.granularity])

    @property
    def name(self) -> str:
        """Such as "fp8_row"."""
        return f"{'fp8' if self.codes is torch.float8_e4m3fn else 'int8'}_{self.granularity}"

    @property
    def options(self) -> dict[str, Any]:
        """The inputs in a block, of methods with blocks."""
        return {"block": self.block} if self.granularity == "block" else {}

    @property
    def largest(self) -> float:
        """The largest code: 448 of fp8, 127 of int8."""
        return 448.0 if self.codes is torch.float8_e4m3fn else 127.0

    def parts(self, outputs: int, inputs: int) -> dict[str, PartInfo]:
        """Return the forms of `weight` and `weight_scale`."""
        blocks = -(-inputs // self.block)
        scales = {"tensor": (), "row": (outputs, 1), "block": (outputs, blocks)}[self.granularity]
        return {
            "weight": PartInfo((outputs, inputs), self.codes),
            "weight_scale": PartInfo(scales, torch.float32),
        }

    def quantize(self, weight: Float[Tensor, "o i"]) -> dict[str, Tensor]:
        """Return codes and scales of a weight; each scale maps the largest number of its group to the largest code."""
        scale = self._scales(weight.float())
        return self._parts(self._rounded(weight.float() / self._spread(scale, weight.shape[1])), scale)

    def quantize_stochastic(self, weight: Float[Tensor, "o i"], noise: Float[Tensor, "o i"]) -> dict[str, Tensor]:
        """Return codes and scales of a weight, each number rounded up with the probability that makes the mean equal
        to it: for training, where changes that are smaller than half a code would be lost.

        Args:
            weight: to store.
            noise: uniform random numbers in [0, 1).
        """
        scale = self._scales(weight.float())
        values = (weight.float() / self._spread(scale, weight.shape[1])).clamp(-self.largest, self.largest)
        # Distance between neighbouring codes at each value: 1 of int8; of fp8 with 3 bits of mantissa 2^(exponent - 3).
        spacing = torch.ones_like(values)
        if self.codes is torch.float8_e4m3fn:
            exponent = torch.frexp(values).exponent - 1
            spacing = torch.exp2(exponent.clamp(min=SMALLEST_FP8).float() - 3)
        return self._parts(self._rounded(torch.floor(values / spacing + noise) * spacing), scale)

    def dequantize(self, parts: Parts, dtype: torch.dtype) -> Float[Tensor, "o i"]:
        """Return codes times scales, computed in fp32 and rounded to `dtype`."""
        codes, scale = parts["weight"].view(self.codes), parts["weight_scale"].view(torch.float32)
        return (codes.float() * self._spread(scale, codes.shape[1])).to(dtype)

    def _scales(self, weight: Tensor) -> Tensor:
        if self.granularity == "tensor":
            largest = weight.abs().amax()
        elif self.granularity == "row":
            largest = weight.abs().amax(1, keepdim=True)
        else:
            padded = F.pad(weight, (0, -weight.shape[1] % self.block))
            largest = padded.unflatten(1, (-1, self.block)).abs().amax(2)
        scale = largest / self.largest
        return torch.where(scale > 0, scale, 1.0)

    def _spread(self, scale: Tensor, inputs: int) -> Tensor:
        """Return scales that broadcast with a weight."""
        return scale.repeat_interleave(self.block, dim=1)[:, :inputs] if self.granularity == "block" else scale

    def _rounded(self, values: Tensor) -> Tensor:
        values = values.clamp(-self.largest, self.largest)
        return (values if self.codes.is_floating_point else values.round()).to(self.codes)

    def _parts(self, codes: Tensor, scale: Tensor) -> dict[str, Tensor]:
        stored = {"weight": codes.contiguous(), "weight_scale": scale}
        forms = self.parts(*codes.shape)
        return {name: tensor.view(forms[name].stored) for name, tensor in stored.items()}


def fp8_tensor() -> ScaledStorage:
    """Return the method of float8_e4m3fn with one scale of each weight."""
    return ScaledStorage(torch.float8_e4m3fn, "tensor")


def fp8_row() -> ScaledStorage:
    """Return the method of float8_e4m3fn with a scale of each output."""
    return ScaledStorage(torch.float8_e4m3fn, "row")


def fp8_block(block: int = 128) -> ScaledStorage:
    """Return the method of float8_e4m3fn with a scale of each `block` inputs of an output."""
    return ScaledStorage(torch.float8_e4m3fn, "block", block)


def int8_tensor() -> ScaledStorage:
    """Return the method of int8 with one scale of each weight."""
    return ScaledStorage(torch.int8, "tensor")


def int8_row() -> ScaledStorage:
    """Return the method of int8 with a scale of each output."""
    return ScaledStorage(torch.int8, "row")


def int8_block(block: int = 128) -> ScaledStorage:
    """Return the method of int8 with a scale of each `block` inputs of an output."""
    return ScaledStorage(torch.int8, "block", block)
