"""Tests of Muon against torch's implementation, which supports matrices only, and against AdamW."""

import pytest
import torch
from torch import nn

from diffsynth_train.config import OptimizerRecipe
from diffsynth_train.muon import orthogonal_factor
from diffsynth_train.optim import build_optimizer

RATE = 0.03


def muon(parameters, tables=()):
    return build_optimizer(OptimizerRecipe(name="muon", learning_rate=RATE, weight_decay=0.1), parameters, tables)


def follow(optimizer, parameter, steps=3):
    generator = torch.Generator().manual_seed(1)
    for _ in range(steps):
        parameter.grad = torch.randn(parameter.shape, generator=generator)
        optimizer.step()
    return parameter.detach()


def drawn(*shape):
    return nn.Parameter(torch.randn(shape, generator=torch.Generator().manual_seed(0)))


@pytest.mark.parametrize("shape", [(6, 4), (4, 6), (5, 5)])
def test_matrices_follow_what_torch_does(shape):
    ours, theirs = drawn(*shape), drawn(*shape)
    oracle = torch.optim.Muon([theirs], lr=RATE, weight_decay=0.1, adjust_lr_fn="match_rms_adamw")
    torch.testing.assert_close(follow(muon([ours]), ours), follow(oracle, theirs))


def test_a_convolution_is_a_matrix_of_its_outputs():
    convolution, matrix = drawn(6, 3, 2, 2), drawn(6, 12)
    assert torch.equal(follow(muon([convolution]), convolution).flatten(1), follow(muon([matrix]), matrix))


@pytest.mark.parametrize("shape", [(7,), (5, 3)], ids=["vector", "table"])
def test_vectors_and_tables_follow_adamw(shape):
    ours, theirs = drawn(*shape), drawn(*shape)
    decay = 0.1 if len(shape) > 1 else 0.0
    oracle = torch.optim.AdamW([theirs], lr=RATE, betas=(0.9, 0.99), weight_decay=decay)
    torch.testing.assert_close(follow(muon([ours], tables=[ours]), ours), follow(oracle, theirs))


def test_singular_values_come_near_one():
    matrix = torch.randn(32, 80, generator=torch.Generator().manual_seed(0))
    values = torch.linalg.svdvals(orthogonal_factor(matrix))
    assert 0.6 < values.min() <= values.max() < 1.3
    u, _, v = torch.linalg.svd(matrix, full_matrices=False)
    assert torch.cosine_similarity(orthogonal_factor(matrix).flatten(), (u @ v).flatten(), dim=0) > 0.97
