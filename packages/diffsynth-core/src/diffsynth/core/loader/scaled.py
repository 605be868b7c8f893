"""Low-precision weights with scales beside them, as other programs write them: `X.weight` and `X.weight_scale`.

The scales become part of the plan: a scaled weight that is only renamed is a `Dequantize`, one that is also split,
fused or reshaped is `Scaled`. Packed formats, whose weights have other shapes than the network's, are recognised by
name and not read.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

from diffsynth.core.loader import convert
from diffsynth.core.loader.convert import Shape

T = TypeVar("T")

_SCALES = ("weight_scale", "scale_weight", "weight_scale_inv")
_UNUSED = ("input_scale", "scale_input", "comfy_quant")
_MARKER = "scaled_fp8"

_PACKED = {
    "weight_scale_2": "NVFP4",
    "qweight": "GPTQ or AWQ",
    "absmax": "bitsandbytes",
    "quant_map": "bitsandbytes",
    "SCB": "bitsandbytes int8",
    "wcscales": "SVDQuant (Nunchaku)",
}


@dataclass(frozen=True)
class Scales:
    """The keys of a file that only describe other tensors of it.

    Args:
        weights: key of a weight -> key of its scale.
        unused: keys that are not needed: scales of activations, and notes to other programs.
    """

    weights: Mapping[str, str]
    unused: tuple[str, ...]

    def without(self, shapes: Mapping[str, Shape]) -> dict[str, Shape]:
        """Return a dict key -> shape of the entries of `shapes` that are neither weights' scales nor unused notes."""
        ours = {*self.weights.values(), *self.unused}
        return {key: shape for key, shape in shapes.items() if key not in ours}


def find(shapes: Mapping[str, Shape]) -> Scales:
    """Return the `Scales` of a file: a dict key of a weight -> key of its scale, and a tuple of keys that are not
    needed.
    """
    weights: dict[str, str] = {}
    unused: list[str] = []
    for key in shapes:
        layer, _, last = key.rpartition(".")
        if last in _SCALES and f"{layer}.weight" in shapes:
            weights[f"{layer}.weight"] = key
        elif last == _MARKER or (last in _UNUSED and f"{layer}.weight" in shapes):
            unused.append(key)
    return Scales(weights, tuple(unused))


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
    """

    rule: convert.Rule
    scales: tuple[str, ...]

    sources = property(lambda self: (*self.rule.sources, *filter(None, self.scales)))
    targets = property(lambda self: self.rule.targets)

    def shapes(self, *sources: Shape) -> tuple[Shape, ...]:
        """Return a tuple of the shapes that the inner rule makes; raise ValueError if a scale does not fit."""
        return self.rule.shapes(*self.dequantized(sources, _scaled_shape))

    def dequantized(self, sources: Sequence[T], multiply: Callable[[T, T], T]) -> tuple[T, ...]:
        """Return a tuple of the inner rule's sources, each replaced by `multiply(source, scale)` if it has a scale; in
        `sources` the scales follow the sources.
        """
        count = len(self.rule.sources)
        scales = iter(sources[count:])
        return tuple(
            multiply(source, next(scales)) if scale else source
            for source, scale in zip(sources[:count], self.scales, strict=True)
        )


def _scaled_shape(weight: Shape, scale: Shape) -> Shape:
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
        if target.sources in made or not any(scales_here):
            continue
        if isinstance(target.rule, convert.Rename):
            made[target.sources] = convert.Dequantize(target.sources[0], scales_here[0], key)
        else:
            made[target.sources] = Scaled(convert.concrete(target.rule, target.sources), scales_here)
    dropped = [scales.weights[key] for key in plan.dropped if key in scales.weights]
    return (*made.values(), *(convert.Drop(key, "of no use here") for key in (*dropped, *scales.unused)))
