"""Quantization methods: how the weight of a linear layer is stored in few bits, and how the layer computes with it.

A method turns a weight into parts, tensors of integer dtypes whose bits may mean something else: fp8 codes are uint8,
fp32 scales int32. So nothing that casts the floating weights of a module, such as `.to(dtype)`, a policy or a
pipeline's dtype, changes a quantized weight, and memory plans count its bytes as they are.
"""

from __future__ import annotations

import abc
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional

Parts = Mapping[str, Tensor]
"""Name of a part -> tensor of an integer dtype; the codes of the weight are the part "weight"."""


@dataclass(frozen=True)
class PartInfo:
    """The form of one part of a quantized weight.

    Args:
        shape: of the tensor.
        dtype: that its bits mean, and that it has in files, such as float8_e4m3fn or float32.
    """

    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def stored(self) -> torch.dtype:
        """The integer dtype of as many bits that the part has in a module."""
        if not self.dtype.is_floating_point:
            return self.dtype
        return {1: torch.uint8, 2: torch.int16, 4: torch.int32}[self.dtype.itemsize]


class QuantMethod(abc.ABC):
    """A quantization method of the weights of linear layers. Methods are frozen dataclasses of their options.

    A subclass states `parts`, `quantize` and `dequantize`; one whose layers compute with the codes overrides `linear`,
    too. `diffsynth.testing` checks the contract of any method.
    """

    error: float
    """Largest relative error, in the Frobenius norm, of a weight of normally distributed numbers, a multiple of 128 in
    both directions."""

    @property
    @abc.abstractmethod
    def name(self) -> str:
        """The name under which the method is declared."""

    @property
    def options(self) -> dict[str, Any]:
        """Dict option -> value: what the declared function makes this method of. Values are those of JSON."""
        return {}

    @abc.abstractmethod
    def parts(self, outputs: int, inputs: int) -> dict[str, PartInfo]:
        """Return a dict name -> `PartInfo` of the parts of a weight `outputs inputs`.

        Raises:
            ValueError: the method has no form for a weight of this shape.
        """

    @abc.abstractmethod
    def quantize(self, weight: Float[Tensor, "o i"]) -> dict[str, Tensor]:
        """Return the parts of a weight, tensors on its device of the shapes and stored dtypes of `parts`."""

    @abc.abstractmethod
    def dequantize(self, parts: Parts, dtype: torch.dtype) -> Float[Tensor, "o i"]:
        """Return the weight that the parts stand for, a new tensor of `dtype`, rounded once."""

    def linear(self, x: Float[Tensor, "... i"], parts: Parts, bias: Tensor | None) -> Float[Tensor, "... o"]:
        """Return the output of the layer for `x`, in its dtype. The weight is dequantized for each call."""
        return functional.linear(x, self.dequantize(parts, x.dtype), bias)

    def refuses(self, device: torch.device) -> str:
        """Return the reason why the method cannot compute on a device; empty if it can."""
        return ""
