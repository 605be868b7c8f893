import pytest
import torch
from torch import nn

from diffsynth_train.config import OptimizerRecipe
from diffsynth_train.optim import build_optimizer, learning_rate


def rates(steps=10, **settings):
    recipe = OptimizerRecipe(learning_rate=1.0, **settings)
    return [learning_rate(recipe, step, steps) for step in range(steps)]


def test_constant_is_constant_from_the_first_step():
    """DiffSynth-Studio's scheduler runs the first five steps at a third of the rate by default."""
    assert rates() == [1.0] * 10


def test_warmup_reaches_the_top():
    assert rates(warmup_steps=4)[:5] == [0.25, 0.5, 0.75, 1.0, 1.0]


def test_cosine_falls_to_nearly_nothing():
    found = rates(100, schedule="cosine", warmup_steps=10)
    assert max(found) == 1.0
    assert found[9:] == sorted(found[9:], reverse=True)
    assert found[-1] < 0.001


def test_trapezoid():
    assert rates(8, schedule="trapezoid", decay_steps=4) == pytest.approx([1, 1, 1, 1, 1, 0.75, 0.5, 0.25])


def test_only_matrices_decay():
    net = nn.Linear(3, 3)
    optimizer = build_optimizer(OptimizerRecipe(learning_rate=0.1, weight_decay=0.5), net.parameters())
    before = [parameter.detach().clone() for parameter in (net.weight, net.bias)]
    for parameter in net.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    torch.testing.assert_close(net.weight.detach(), before[0] * 0.95)
    torch.testing.assert_close(net.bias.detach(), before[1])
