"""The conversion rules as operations on tensors, and which of them only join consecutive elements of a file."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any

import torch
from torch import Tensor

from diffsynth.core.loader import convert
from diffsynth.core.loader.convert import Shape
from diffsynth.core.loader.dtypes import torch_dtypes
from diffsynth.core.loader.quantization_notes import MX_BLOCK, PLAIN, Encoding
from diffsynth.core.loader.scaled import Scaled, tiles_of


def apply_rule(rule: convert.Rule, sources: tuple[Tensor, ...], index: int) -> Tensor:
    """Return the tensor, contiguous, that a rule makes of `sources` as output number `index`; it may share their
    memory.
    """
    return strided(rule, sources, index).contiguous()


def strided(rule: convert.Rule, sources: tuple[Tensor, ...], index: int) -> Tensor:
    """Return the tensor that a rule makes of `sources` as output number `index`, as a strided view of them where
    possible.

    The copy that follows then moves the elements once.
    """
    for kind, make in _OPS.items():
        if isinstance(rule, kind):
            return make(rule, sources, index)
    raise AssertionError(f"no op for {type(rule).__name__}")


def dequantize(weight: Tensor, scale: Tensor | None, encoding: Encoding = PLAIN) -> Tensor:
    """Return an fp32 tensor of the weight's shape: the weight times its scale (one number, or one for each row or
    block), with a rotation undone.

    Args:
        weight: low-precision weight of any shape.
        scale: one number, one number per row, or one number per block of equal size; for MXFP8 the tiled exponents;
            None for a weight without scale.
        encoding: how the weight is stored.
    """
    if encoding.bits:
        weight = weight.view(torch_dtypes()[encoding.bits])
    if scale is not None and encoding.tiled_exponents:
        scale = _mx_scales(scale, tuple(weight.shape))
    weight = weight.float() if scale is None else _scaled(weight.float(), scale.float())
    if encoding.rotation:
        groups = weight.unflatten(-1, (-1, encoding.rotation))
        weight = (groups @ _hadamard(encoding.rotation)).flatten(-2)
    return weight


def _scaled(weight: Tensor, scale: Tensor) -> Tensor:
    if scale.numel() == 1:
        return weight * scale.reshape(())
    scale = scale.reshape(scale.shape + (1,) * (weight.dim() - scale.dim()))
    for axis, (extent, blocks) in enumerate(zip(weight.shape, scale.shape, strict=True)):
        if blocks not in (1, extent):
            scale = scale.repeat_interleave(extent // blocks, dim=axis)
    return weight * scale


def _mx_scales(exponents: Tensor, weight: Shape) -> Tensor:
    """Return the scales of an MXFP8 weight, fp32 `rows blocks`: 2**(exponent - 127), from tiles of 128 x 4 exponents.

    Within a tile the exponent of row r and block c is number (r % 32) * 16 + (r // 32) * 4 + c, the order in which
    cuBLAS reads the scales of a block-scaled matrix (its manual, "1D block scaling factors layout").
    """
    rows, columns = tiles_of(weight)
    tiles = exponents.view(torch.uint8).reshape(rows, columns, 32, 4, 4)
    ordered = tiles.permute(0, 3, 2, 1, 4).reshape(rows * 128, columns * 4)
    kept = ordered[: weight[0], : weight[1] // MX_BLOCK]
    # 255 stands for no number.
    return torch.exp2(kept.float() - 127).masked_fill(kept == 255, torch.nan)


@functools.lru_cache(maxsize=4)
def _hadamard(size: int) -> Tensor:
    """Return the regular Hadamard matrix of a size that is a power of 4, divided by its square root: fp32, symmetric
    and its own inverse (ConvRot, arXiv:2512.03673).
    """
    four = torch.tensor([[1.0, 1, 1, -1], [1, 1, -1, 1], [1, -1, 1, 1], [-1, 1, 1, 1]]) / 2
    made = torch.ones(1, 1)
    while len(made) < size:
        made = torch.kron(made, four)
    return made


@dataclass(frozen=True)
class ElementRun:
    """`count` consecutive elements of source number `source`, from element `first` on, in stored order."""

    source: int
    first: int
    count: int


def runs(target: convert.Target, sources: Sequence[Shape]) -> list[ElementRun] | None:
    """Return a list of `ElementRun`s (consecutive source elements) that make up a target, in order; None if it is
    computed, permuted, or cut or joined along an inner axis.

    Args:
        target: the planned target.
        sources: shapes of its sources.
    """
    rule = target.rule
    if isinstance(rule, convert.Rename | convert.Tie | convert.Reshape):
        return [ElementRun(0, 0, prod(sources[0]))]
    joins = isinstance(rule, convert.Split | convert.Fuse | convert.ReorderChunks)
    # Parts along an axis are consecutive only if all axes in front of it have extent 1.
    if not joins or prod(sources[0][: rule.dim]) != 1:
        return None
    if isinstance(rule, convert.Fuse):
        return [ElementRun(number, 0, prod(shape)) for number, shape in enumerate(sources)]
    (shape,) = sources
    if isinstance(rule, convert.Split):
        inner = prod(shape[rule.dim + 1 :])
        sizes = rule.part_sizes(shape)
        return [ElementRun(0, sum(sizes[: target.index]) * inner, sizes[target.index] * inner)]
    size = prod(shape) // len(rule.order)
    return [ElementRun(0, chunk * size, size) for chunk in rule.order]


def _check(rule: convert.Check, sources: tuple[Tensor, ...], index: int) -> Tensor:
    rule.function(sources[0])
    return sources[0]


def _split(rule: convert.Split, sources: tuple[Tensor, ...], index: int) -> Tensor:
    return sources[0].split(rule.part_sizes(tuple(sources[0].shape)), dim=rule.dim)[index]


def _reorder(rule: convert.ReorderChunks, sources: tuple[Tensor, ...], index: int) -> Tensor:
    chunks = sources[0].chunk(len(rule.order), dim=rule.dim)
    return torch.cat([chunks[chunk] for chunk in rule.order], dim=rule.dim)


_OPS: Mapping[type, Callable[[Any, tuple[Tensor, ...], int], Tensor]] = {
    convert.Rename: lambda rule, sources, index: sources[0],
    convert.Tie: lambda rule, sources, index: sources[0],
    convert.Split: _split,
    convert.Fuse: lambda rule, sources, index: torch.cat(sources, dim=rule.dim),
    convert.Reshape: lambda rule, sources, index: sources[0].reshape(rule.shapes(tuple(sources[0].shape))[0]),
    convert.Permute: lambda rule, sources, index: sources[0].permute(rule.order),
    convert.ReorderChunks: _reorder,
    convert.Dequantize: lambda rule, sources, index: dequantize(sources[0], sources[1]),
    convert.Constant: lambda rule, sources, index: torch.full(rule.shape, rule.value),
    convert.Check: _check,
    convert.Apply: lambda rule, sources, index: rule.function(*sources),
    Scaled: lambda rule, sources, index: strided(rule.rule, rule.dequantized(sources, dequantize), index),
}
