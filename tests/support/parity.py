"""Compare a network with an independent implementation, the oracle, on random weights.

The error is `max|a - b| / max|b|`. A comparison counts only if perturbing any parameter changes the oracle's output.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping

import torch
from torch import Tensor, nn

TOLERANCE = 1e-4
"""Largest error of a network in fp32."""


def draw_weights(shapes: Mapping[str, tuple[int, ...]], seed: int = 0) -> dict[str, Tensor]:
    """Return random fp32 weights by name.

    The standard deviation is 1 / sqrt(fan_in) for matrices, 1 for embeddings and 0.3 for biases; norms are 1 +- 0.3.
    """
    generator = torch.Generator().manual_seed(seed)
    weights = {}
    for name, shape in sorted(shapes.items()):
        drawn = torch.randn(shape, generator=generator)
        if name.endswith("bias"):
            drawn = 0.3 * drawn
        elif len(shape) == 1:
            drawn = 1 + 0.3 * (2 * torch.rand(shape, generator=generator) - 1)
        elif len(shape) > 1 and shape[0] > 1 and "embed_tokens" not in name:
            drawn = drawn / drawn[0].numel() ** 0.5
        weights[name] = drawn
    return weights


def shapes_of(module: nn.Module) -> dict[str, tuple[int, ...]]:
    """Return key -> shape of the module's state dict."""
    return {name: tuple(tensor.shape) for name, tensor in module.state_dict().items()}


def relative_error(ours: Tensor, truth: Tensor) -> float:
    """Return `max|ours - truth| / max|truth|`; infinite where shapes differ or a value is not finite."""
    if ours.shape != truth.shape or not bool(ours.isfinite().all()):
        return float("inf")
    ours, truth = ours.detach().double(), truth.detach().double()
    return float((ours - truth).abs().max() / truth.abs().max())


@torch.no_grad()
def neutral_parameters(
    oracle: nn.Module, run: Callable[[], Tensor], *, skip: Iterable[str] = (), threshold: float = 1e-3
) -> list[str]:
    """Return the names of parameters whose change by half moves the output of `run` by at most `threshold`."""
    generator = torch.Generator().manual_seed(1)
    reference = run()
    neutral = []
    for name, parameter in oracle.named_parameters():
        if name in skip:
            continue
        original = parameter.clone()
        noise = torch.randn(parameter.shape, generator=generator).to(parameter)
        parameter.mul_(1 + 0.5 * noise)
        if relative_error(run(), reference) <= threshold:
            neutral.append(name)
        parameter.copy_(original)
    return neutral
