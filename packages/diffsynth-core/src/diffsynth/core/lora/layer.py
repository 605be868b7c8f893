"""What a LoRA is: for each linear layer that it changes, two thin matrices (Hu et al. 2021, arXiv:2106.09685)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from jaxtyping import Float
from torch import Tensor


@dataclass(frozen=True, eq=False)
class LoRALayer:
    """The change of one layer: `W + scale * up @ down`.

    Args:
        down: `A`, from the layer's inputs to the rank.
        up: `B`, from the rank to the layer's outputs.
        alpha: the change is divided by the rank and multiplied by this; None is the rank, which changes nothing.
    """

    down: Float[Tensor, "rank inputs"]
    up: Float[Tensor, "outputs rank"]
    alpha: float | None = None

    @property
    def rank(self) -> int:
        """Of the change, at most."""
        return self.down.shape[0]

    @property
    def scale(self) -> float:
        """`alpha / rank`."""
        return 1.0 if self.alpha is None else self.alpha / self.rank

    @property
    def shape(self) -> tuple[int, int]:
        """Of the weight that it changes: outputs, inputs."""
        return self.up.shape[0], self.down.shape[1]

    def scaled_up(self, alpha: float = 1.0) -> Float[Tensor, "outputs rank"]:
        """`up` in fp32, with `alpha * scale` in it."""
        return self.up.float() * (alpha * self.scale)


@dataclass(frozen=True, eq=False)
class LoRA:
    """The layers of one file, by the names of the modules that they change.

    Args:
        layers: module name -> change.
        where: the file, for messages.
    """

    layers: Mapping[str, LoRALayer]
    where: str = "the given state_dict"
