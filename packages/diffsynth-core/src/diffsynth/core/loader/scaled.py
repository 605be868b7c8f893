"""Low-precision weights with scales beside them, as other programs write them: `X.weight` and `X.weight_scale`.

The scales become part of the plan: a scaled weight that is only renamed is a `Dequantize`; one that is also split,
fused or reshaped, or stored in another way than its dtype says (`quantization_notes`), is `Scaled`. Packed formats,
whose weights have other shapes than the network's, are recognised by name and not read.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from math import prod
from typing import TypeVar

from diffsynth.core.loader import convert
from diffsynth.core.loader.convert import Shape
from diffsynth.core.loader.quantization_notes import MX_BLOCK, NOTE, PLAIN, SCALES, Encoding

T = TypeVar("T")

_UNUSED = ("input_scale", "scale_input", NOTE)
_MARKER = "scaled_fp8"

_PACKED = {
    "weight_scale_2": "NVFP4",
    "qweight": "GPTQ or AWQ",
    "absmax": "bitsandbytes",
    "quant_map": "bitsandbytes",
    "bitsandbytes__nf4": "bitsandbytes",
    "bitsandbytes__fp4": "bitsandbytes",
    "SCB": "bitsandbytes int8",
    "wcscales": "SVDQuant (Nunchaku)",
}


@dataclass(frozen=True)
class Scales:
    """The keys of a file that only describe other tensors of it.

    Args:
        weights: key of a weight -> key of its scale.
        unused: keys that are not needed: scales of activations, and notes, which were read before.
        encodings: key of a weight -> how it is stored, if a note says so.
    """

    weights: Mapping[str, str]
    unused: tuple[str, ...]
    encodings: Mapping[str, Encoding] = field(default_factory=dict)

    def __bool__(self) -> bool:
        return bool(self.weights or self.unused or any(not each.is_plain for each in self.encodings.values()))

    def without(self, shapes: Mapping[str, Shape]) -> dict[str, Shape]:
        """Return a dict key -> shape of the entries of `shapes` that are neither weights' scales nor unused notes."""
        ours = {*self.weights.values(), *self.unused}
        return {key: shape for key, shape in shapes.items() if key not in ours}


def find(shapes: Mapping[str, Shape], encodings: Mapping[str, Encoding] | None = None) -> Scales:
    """Return the `Scales` of a file: a dict key of a weight -> key of its scale, and a tuple of keys that are not
    needed.

    Args:
        shapes: key -> shape of the file's tensors.
        encodings: key of a weight -> how it is stored, from `quantization_notes.encodings`.
    """
    weights: dict[str, str] = {}
    unused: list[str] = []
    for key in shapes:
        layer, _, last = key.rpartition(".")
        if last in SCALES and f"{layer}.weight" in shapes:
            weights[f"{layer}.weight"] = key
        elif last == _MARKER or (last in _UNUSED and f"{layer}.weight" in shapes):
            unused.append(key)
    return Scales(weights, tuple(unused), encodings or {})


def has_scale_marker(keys: Iterable[str]) -> bool:
    """Whether a key says that the file's fp8 weights have scales, as ComfyUI's `scaled_fp8` does."""
    return any(key.rpartition(".")[2] == _MARKER for key in keys)


def packed_format(keys: Iterable[str]) -> str:
    """Return the name of the packed quantisation that these keys show, such as "NVFP4"; empty if they show none."""
    lasts = (key.rpartition(".")[2] for key in keys)
    return next((_PACKED[last] for last in lasts if last in _PACKED), "")


@dataclass(frozen=True)
class Scaled(convert.Rule):
    """Another rule, applied to sources that are multiplied by their scales first.

    Args:
        rule: the inner rule, with all holes filled.
        scales: key of each source's scale; "" for a source that has none.
        encodings: how each source is stored; empty if all are plain.
    """

    rule: convert.Rule
    scales: tuple[str, ...]
    encodings: tuple[Encoding, ...] = ()

    sources = property(lambda self: (*self.rule.sources, *filter(None, self.scales)))
    targets = property(lambda self: self.rule.targets)

    def shapes(self, *sources: Shape) -> tuple[Shape, ...]:
        """Return a tuple of the shapes that the inner rule makes; raise ValueError if a scale does not fit."""
        return self.rule.shapes(*self.dequantized(sources, _scaled_shape))

    def dequantized(self, sources: Sequence[T], multiply: Callable[[T, T | None, Encoding], T]) -> tuple[T, ...]:
        """Return a tuple of the inner rule's sources, each replaced by `multiply(source, scale, encoding)` if it has a
        scale (else None) or is not plain; in `sources` the scales follow the sources.
        """
        count = len(self.rule.sources)
        scales = iter(sources[count:])
        encodings = self.encodings or (PLAIN,) * count
        return tuple(
            source if not scale and each.is_plain else multiply(source, next(scales) if scale else None, each)
            for source, scale, each in zip(sources[:count], self.scales, encodings, strict=True)
        )


def tiles_of(weight: Shape) -> tuple[int, int]:
    """Return the number of tiles of 128 x 4 exponents along each axis that an MXFP8 weight of this shape has."""
    return -(-weight[0] // 128), -(-weight[1] // (4 * MX_BLOCK))


def _scaled_shape(weight: Shape, scale: Shape | None, encoding: Encoding) -> Shape:
    if scale is None:
        return weight
    if encoding.tiled_exponents:
        if len(weight) != 2 or weight[1] % MX_BLOCK or prod(scale) != prod(tiles_of(weight)) * 512:
            raise ValueError(f"MXFP8 exponents of shape {scale} do not fit a weight of shape {weight}")
        return weight
    return convert.Dequantize("weight", "scale", "target").shapes(weight, scale)[0]


def rules(scales: Scales, plan: convert.Plan) -> tuple[convert.Rule, ...]:
    """Return a tuple of `Rule`s that multiply a file's weights by their scales and drop unused keys; they precede the
    layout's.

    Args:
        scales: the file's scales.
        plan: the plan that the layout's own rules make of the file without its scales.
    """
    made: dict[tuple[str, ...], convert.Rule] = {}
    for key, target in plan.targets.items():
        scales_here = tuple(scales.weights.get(source, "") for source in target.sources)
        encodings = tuple(scales.encodings.get(source, PLAIN) for source in target.sources)
        plain = all(each.is_plain for each in encodings)
        if target.sources in made or (plain and not any(scales_here)):
            continue
        if plain and isinstance(target.rule, convert.Rename):
            made[target.sources] = convert.Dequantize(target.sources[0], scales_here[0], key)
        else:
            rule = convert.concrete(target.rule, target.sources)
            made[target.sources] = Scaled(rule, scales_here, () if plain else encodings)
    dropped = [scales.weights[key] for key in plan.dropped if key in scales.weights]
    return (*made.values(), *(convert.Drop(key, "of no use here") for key in (*dropped, *scales.unused)))
