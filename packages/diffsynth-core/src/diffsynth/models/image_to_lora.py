"""Image-to-LoRA: a network that makes a LoRA of another network from the embedding of an image.

For each linear layer that the LoRA changes there are two small networks, one for each of its matrices. There is no
paper; the published files are Qwen-Image-i2L and Z-Image-i2L of DiffSynth-Studio.
"""

from __future__ import annotations

from jaxtyping import Float
from torch import Tensor, nn

from diffsynth.models.image_config import ImageToLoRAConfig, LoRATarget

_RESIDUAL_SCALE = 0.05
"""Factor of the hidden states of the residual, a constant of the published networks."""


class ImageToLoRA(nn.Module):
    """Network from the embedding of an image to a LoRA. Parameter names are those of the published files."""

    def __init__(self, config: ImageToLoRAConfig) -> None:
        super().__init__()
        self.config = config
        for name, _, count in config.stacks:
            # For each group of layers all blocks of the network that the LoRA changes.
            blocks = nn.ModuleList(LoRABlock(config, group) for group in config.groups for _ in range(count))
            if name:
                self.add_module(name, nn.Module())
                self.get_submodule(name).blocks = blocks
            else:
                self.blocks = blocks

    def forward(
        self, image: Float[Tensor, "e"], residual: Float[Tensor, "s e_r"] | None = None
    ) -> dict[str, tuple[Float[Tensor, "rank inputs"], Float[Tensor, "outputs rank"]]]:
        """Return a dict name of a linear layer -> (matrix A, matrix B), the LoRA of one image.

        Args:
            image: embedding of the image, of `config.image_dim` channels.
            residual: hidden states of a vision-language model for the image, `config.residual_length` tokens; only for
                a network that has a residual.
        """
        if residual is not None:
            residual = residual * _RESIDUAL_SCALE
        lora = {}
        for name, prefix, count in self.config.stacks:
            blocks = self.get_submodule(name).blocks if name else self.blocks
            for index, block in enumerate(blocks):
                for target, matrices in block(image, residual).items():
                    lora[f"{prefix}.{index % count}.{target}"] = matrices
        return lora


class LoRABlock(nn.Module):
    """The networks for a group of linear layers in one block of the network that the LoRA changes."""

    def __init__(self, config: ImageToLoRAConfig, group: tuple[LoRATarget, ...]) -> None:
        super().__init__()
        self.targets = group
        self.layers = nn.ModuleList(LoRAMatrices(config, inputs, outputs) for _, inputs, outputs in group)
        self.proj_residual = ResidualProjection(config) if config.residual_length else None

    def forward(
        self, image: Float[Tensor, "e"], residual: Float[Tensor, "s e_r"] | None
    ) -> dict[str, tuple[Float[Tensor, "rank inputs"], Float[Tensor, "outputs rank"]]]:
        """Return a dict name of a layer in the block -> (matrix A, matrix B)."""
        inner = None if self.proj_residual is None or residual is None else self.proj_residual(residual)
        return {name: layer(image, inner) for (name, _, _), layer in zip(self.targets, self.layers, strict=True)}


class LoRAMatrices(nn.Module):
    """The networks for the two matrices of one linear layer."""

    def __init__(self, config: ImageToLoRAConfig, inputs: int, outputs: int) -> None:
        super().__init__()
        self.rank = config.rank
        self.proj_a = _projection(config.image_dim, config.compress_dim, config.rank * inputs)
        self.proj_b = _projection(config.image_dim, config.compress_dim, config.rank * outputs)

    def forward(
        self, image: Float[Tensor, "e"], inner: Float[Tensor, "e_c"] | None
    ) -> tuple[Float[Tensor, "rank inputs"], Float[Tensor, "outputs rank"]]:
        """Return (matrix A, matrix B).

        Args:
            image: embedding of the image.
            inner: of the residual, added between the two linear layers of each network.
        """
        down, up = (
            each["proj_out"](each["proj_in"](image) if inner is None else each["proj_in"](image) + inner)
            for each in (self.proj_a, self.proj_b)
        )
        return down.unflatten(0, (self.rank, -1)), up.unflatten(0, (-1, self.rank))


class ResidualProjection(nn.Module):
    """Projection of the hidden states of all tokens to one vector."""

    def __init__(self, config: ImageToLoRAConfig) -> None:
        super().__init__()
        self.length = config.residual_length
        self.proj_in = nn.Linear(config.residual_dim, config.residual_mid_dim, bias=False)
        self.proj_out = nn.Linear(config.residual_length * config.residual_mid_dim, config.compress_dim, bias=False)

    def forward(self, residual: Float[Tensor, "s e_r"]) -> Float[Tensor, "e_c"]:
        """Return the vector `e_c`.

        Raises:
            ValueError: another number of tokens than the network was trained with.
        """
        if len(residual) != self.length:
            raise ValueError(f"the residual has {len(residual)} tokens; expected {self.length}")
        return self.proj_out(self.proj_in(residual).flatten())


def _projection(inputs: int, inner: int, outputs: int) -> nn.ModuleDict:
    return nn.ModuleDict(
        {"proj_in": nn.Linear(inputs, inner, bias=False), "proj_out": nn.Linear(inner, outputs, bias=False)}
    )
