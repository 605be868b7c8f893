"""Merging LoRAs, and changing their rank."""

import pytest
import torch

import lora_networks as small
from diffsynth.core.lora import merge_lora, parse, reset_lora_rank
from diffsynth.errors import KeyMismatch


def product(layer):
    return layer.scaled_up() @ layer.down.float()


def test_merged_is_the_sum():
    """Layers that both LoRAs change, and that one does, in equal and different key names, with and without alpha."""
    first = small.state_dict("{}.lora_{down,up}.weight", small.factors(seed=1), alpha=2)
    second = small.state_dict(made=small.factors(names=small.TARGETS[2:], rank=5, seed=2))
    merged = parse(merge_lora([first, second], alpha=0.5)).layers
    one, other = parse(first).layers, parse(second).layers
    assert merged.keys() == one.keys()
    assert merged[small.TARGETS[2]].rank == 8
    for name, layer in merged.items():
        expected = 0.5 * (product(one[name]) + (product(other[name]) if name in other else 0))
        torch.testing.assert_close(product(layer), expected)


def test_nothing_to_merge():
    with pytest.raises(ValueError, match="got no LoRA"):
        merge_lora([])
    wide = small.state_dict(made={small.TARGETS[0]: (torch.ones(2, 16), torch.ones(16, 2))})
    with pytest.raises(KeyMismatch, match="of different models"):
        merge_lora([small.state_dict(), wide])


def test_a_smaller_rank_is_the_nearest():
    """The error equals the singular values beyond the rank."""
    keys = small.state_dict(made=small.factors(rank=5), alpha=2)
    before, after = parse(keys).layers, parse(reset_lora_rank(keys, 2)).layers
    for name, layer in after.items():
        assert (layer.rank, layer.scale) == (2, 1)
        lost = torch.linalg.matrix_norm(product(before[name]) - product(layer))
        least = torch.linalg.svdvals(product(before[name]))[2:].norm()
        torch.testing.assert_close(lost, least, rtol=1e-4, atol=1e-5)


def test_a_larger_rank_changes_nothing():
    keys = small.state_dict()
    for name, layer in parse(reset_lora_rank(keys, 12)).layers.items():
        assert layer.rank == 12
        torch.testing.assert_close(product(layer), product(parse(keys).layers[name]), rtol=1e-4, atol=1e-5)
    with pytest.raises(ValueError, match="rank=0: expected 1 or more"):
        reset_lora_rank(keys, 0)
