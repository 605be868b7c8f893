"""The changes that a LoRA file makes to parameters, as arithmetic on tensors.

Low-rank changes of linear layers are `LoRALayer`s (Hu et al. 2021, arXiv:2106.09685). All others are
`ParameterChange`s: convolutions, embeddings, biases, plain differences, new values, LoHa (Hyeon-Woo et al. 2021,
arXiv:2108.06098), LoKr (Yeh et al. 2023, arXiv:2309.14859), and any of them with the magnitudes of DoRA (Liu et al.
2024, arXiv:2402.09353).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from diffsynth.core.loader import convert
from diffsynth.core.loader.convert import Shape
from diffsynth.core.loader.lora_keys import (
    DIFFERENCE,
    DORA,
    EMBEDDING,
    LOHA,
    LOKR,
    LOW_RANK,
    REPLACEMENT,
    Change,
)
from diffsynth.core.loader.lora_match import IDENTITIES
from diffsynth.core.loader.reader.ops import apply_rule


@dataclass(frozen=True, eq=False)
class LoRALayer:
    """The change of one linear layer: its weight becomes `W + scale * up @ down`.

    Args:
        down: matrix A, from the layer's inputs to the rank.
        up: matrix B, from the rank to the layer's outputs.
        alpha: the change is multiplied by `alpha / rank`; None means by 1.
    """

    down: Float[Tensor, "rank inputs"]
    up: Float[Tensor, "outputs rank"]
    alpha: float | None = None

    @property
    def rank(self) -> int:
        """Rank of the change, an int: rows of `down` and columns of `up`."""
        return self.down.shape[0]

    @property
    def scale(self) -> float:
        """Factor of the change: `alpha / rank`, or 1.0 if `alpha` is None."""
        return 1.0 if self.alpha is None else self.alpha / self.rank

    @property
    def shape(self) -> tuple[int, int]:
        """Shape (outputs, inputs) of the weight that is changed, a tuple of ints."""
        return self.up.shape[0], self.down.shape[1]

    def scaled_up(self, alpha: float = 1.0) -> Float[Tensor, "outputs rank"]:
        """Return matrix B (`up`) multiplied by `alpha * scale`, a new fp32 tensor."""
        return self.up.float() * (alpha * self.scale)


@dataclass(frozen=True, eq=False)
class Factors:
    """The tensors of one change in a file.

    Args:
        change: what the file's keys say of it.
        tensors: part of the change, such as `"lokr_w1"`, -> tensor.
        scale: factor of the change, `alpha / rank`.
        alpha: alpha of a plain LoRA as it was read; None if there is none.
    """

    change: Change
    tensors: Mapping[str, Tensor]
    scale: float = 1.0
    alpha: float | None = None

    @property
    def magnitude(self) -> Tensor | None:
        """The magnitudes of a DoRA, one number per output, or per input if `change.by_inputs`; None without DoRA."""
        found = self.tensors.get("magnitude")
        return None if found is None else found.flatten()

    def delta(self, device: torch.device) -> Tensor:
        """Return the difference of the file's weight, without magnitudes, or the new value of a replacement, as a new
        fp32 tensor of shape `change.shape` on `device`.
        """
        parts = {name: tensor.to(device, torch.float32) for name, tensor in self.tensors.items()}
        return (_DELTAS[self.change.kind](parts) * self.scale).reshape(self.change.shape)


@dataclass(frozen=True, eq=False)
class Part:
    """A change of one of our parameters: output `index` of `rule`, applied to changes of a file's weights.

    Args:
        rule: the rule that converts the weight.
        index: the number of the rule's output.
        sources: the changes; a shape stands for a weight that the LoRA leaves alone.
    """

    rule: convert.Rule
    index: int
    sources: tuple[Factors | Shape, ...]

    @property
    def factors(self) -> tuple[Factors, ...]:
        """The changes among the sources, a tuple."""
        return tuple(each for each in self.sources if isinstance(each, Factors))

    def difference(self, weight: Tensor) -> Tensor:
        """Return what is added to `weight` (fp32) at strength 1, an fp32 tensor of its shape."""
        deltas = tuple(
            each.delta(weight.device) if isinstance(each, Factors) else torch.zeros(each, device=weight.device)
            for each in self.sources
        )
        delta = self._converted(deltas).reshape(weight.shape)
        if self.factors[0].change.kind == REPLACEMENT:
            return delta - weight
        magnitudes = [each.magnitude for each in self.factors]
        if all(magnitude is None for magnitude in magnitudes):
            return delta
        if any(each.change.by_inputs for each in self.factors):
            return self._each_with_magnitude(weight + delta) - weight
        rows = tuple(
            torch.full((_outputs(each),), torch.nan, device=weight.device)
            if not isinstance(each, Factors) or each.magnitude is None
            else each.magnitude.to(weight.device, torch.float32)
            for each in self.sources
        )
        return _with_magnitude(weight + delta, self._converted(rows), axis=0) - weight

    def _each_with_magnitude(self, changed: Tensor) -> Tensor:
        """Return `changed`, of which the rows of each source have its magnitudes; a column ends with these rows."""
        sources = [torch.full((_outputs(each),), number) for number, each in enumerate(self.sources)]
        owners = self._converted(tuple(sources)).to(changed.device)  # of each row
        for number, each in enumerate(self.sources):
            if isinstance(each, Factors) and each.magnitude is not None:
                rows = owners == number
                axis = 1 if each.change.by_inputs else 0
                changed[rows] = _with_magnitude(changed[rows], each.magnitude, axis=axis)
        return changed

    def _converted(self, tensors: tuple[Tensor, ...]) -> Tensor:
        # The file's second source of a dequantized weight is its scale, which no LoRA changes.
        return tensors[0] if isinstance(self.rule, IDENTITIES) else apply_rule(self.rule, tensors, self.index)


@dataclass(frozen=True, eq=False)
class ParameterChange:
    """The change of one parameter of any shape: the sum of its parts.

    Args:
        parts: the changes that add up.
        inputs: number of inputs that a linear layer is given first, by `widen`; 0 keeps the layer's own.
    """

    parts: tuple[Part, ...]
    inputs: int = 0

    @property
    def kind(self) -> str:
        """The kinds of change, a str such as `"DoRA"`, `"LoKr"` or `"difference"`, for messages."""
        if self.inputs:
            return f"{LOW_RANK} with more inputs"
        found = [DORA if each.change.is_dora else each.change.kind for each in self.factors]
        return " and ".join(sorted(set(found)))

    @property
    def factors(self) -> tuple[Factors, ...]:
        """The file's changes that this one is made of, a tuple."""
        return tuple(factors for part in self.parts for factors in part.factors)

    def difference(self, weight: Tensor) -> Tensor:
        """Return what is added to a weight at strength 1.

        Args:
            weight: the unchanged parameter, fp32. A DoRA depends on it.

        Returns:
            An fp32 tensor of the weight's shape, on its device.
        """
        return sum((part.difference(weight) for part in self.parts[1:]), start=self.parts[0].difference(weight))


def factors_of(layer: LoRALayer, module: str) -> Factors:
    """Return a `LoRALayer` as `Factors`, for a layer with this name in its file."""
    keys = {"down": f"{module}.lora_A.weight", "up": f"{module}.lora_B.weight"}
    change = Change(module, "weight", LOW_RANK, keys, layer.shape, layer.rank)
    return Factors(change, {"down": layer.down, "up": layer.up}, layer.scale, layer.alpha)


def single(factors: Factors) -> ParameterChange:
    """Return the `ParameterChange` of one change that no rule converts."""
    name = factors.change.name
    return ParameterChange((Part(convert.Rename(name, name), 0, (factors,)),))


def _outputs(source: Factors | Shape) -> int:
    return (source.change.shape if isinstance(source, Factors) else source)[0]


def _with_magnitude(weight: Tensor, magnitude: Tensor | None, axis: int) -> Tensor:
    """Return `weight` with each row (`axis` 0) or column (1) scaled to the length `magnitude`; a magnitude of NaN, or a
    row of zeros, leaves it as it is.
    """
    assert magnitude is not None
    others = [each for each in range(weight.dim()) if each != axis]
    length = torch.linalg.vector_norm(weight, dim=others, keepdim=True)
    target = magnitude.to(weight.device, torch.float32).reshape(length.shape)
    return torch.where(torch.isnan(target) | (length == 0), weight, weight * (target / length))


def _low_rank(parts: Mapping[str, Tensor]) -> Tensor:
    down, up = parts["down"], parts["up"].flatten(1)
    if "mid" in parts:
        return torch.einsum("om,mn...,ni->oi...", up, parts["mid"], down.flatten(1))
    return torch.einsum("or,r...->o...", up, down)


def _product(parts: Mapping[str, Tensor], name: str, core: str) -> Tensor:
    """Return the product of `{name}_a` and `{name}_b`, through the Tucker core `core` if the file has one."""
    if name in parts:
        return parts[name]
    first, second = parts[f"{name}_a"], parts[f"{name}_b"]
    if core in parts:
        return torch.einsum("mn...,mo,ni->oi...", parts[core], first, second)
    return torch.einsum("or,r...->o...", first, second)


def _loha(parts: Mapping[str, Tensor]) -> Tensor:
    return _product(parts, "hada_w1", "hada_t1") * _product(parts, "hada_w2", "hada_t2")


def _lokr(parts: Mapping[str, Tensor]) -> Tensor:
    first, second = _product(parts, "lokr_w1", ""), _product(parts, "lokr_w2", "lokr_t2")
    return torch.kron(first.reshape(first.shape + (1,) * (second.dim() - 2)), second)


_DELTAS: Mapping[str, Callable[[Mapping[str, Tensor]], Tensor]] = {
    LOW_RANK: _low_rank,
    LOHA: _loha,
    LOKR: _lokr,
    DIFFERENCE: lambda parts: parts[DIFFERENCE],
    REPLACEMENT: lambda parts: parts[REPLACEMENT],
    EMBEDDING: lambda parts: (parts["embedding_B"] @ parts["embedding_A"]).T,
}
"""Kind of change -> the difference of the weight that its fp32 tensors make, before its factor; the new value itself
for a replacement."""
