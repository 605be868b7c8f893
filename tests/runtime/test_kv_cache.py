"""Keys and values as arguments: what is refused, and the extension that is made of them."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from diffsynth.runtime.kv_cache import kv_cache_feature

FEATURE = kv_cache_feature({"block": ("blocks", "n_layers"), "last_block": ("last_blocks", "n_last")}, role="net")
CONFIG = SimpleNamespace(n_layers=2, n_last=1, n_heads=3, head_dim=4)


def pair(*shape):
    return (torch.zeros(shape), torch.ones(shape))


def check(config=CONFIG, **cache):
    FEATURE.check({"net": config}, {"kv_cache": None, "negative_kv_cache": cache, "batch_size": 2})


def test_names_lead_to_stacks():
    (unit,) = FEATURE.units
    cache = {"block_1": pair(1, 5, 3, 4), "last_block_0": pair(2, 5, 3, 4)}
    check(**cache)
    made = unit.function(kv_cache=cache, device=torch.device("cpu"), dtype=torch.bfloat16)
    assert list(made.blocks) == [("blocks", 1), ("last_blocks", 0)]
    assert all(x.dtype is torch.bfloat16 for x in made.blocks["blocks", 1])
    assert unit.function(kv_cache=None, device=torch.device("cpu"), dtype=torch.bfloat16) is None


@pytest.mark.parametrize(
    ("cache", "kind", "message"),
    [
        ({"blok_1": ()}, ValueError, "has 'blok_1', .* block_0 to block_1 and last_block_0 .* did you mean 'block_1'"),
        ({"block_0": torch.zeros(1)}, TypeError, r"negative_kv_cache\['block_0'\] is Tensor; expected a tuple"),
        ({"block_0": (torch.zeros(1, 5, 3, 4, dtype=torch.long),) * 2}, TypeError, "dtypes torch.int64, "),
        ({"block_0": pair(1, 5, 4, 3)}, ValueError, r"\(1, 5, 4, 3\) and .*; expected two of \(1, tokens, 3, 4\)"),
        ({"block_0": pair(3, 5, 3, 4)}, ValueError, "one item for each of 2 results"),
        ({"block_0": (torch.zeros(1, 5, 3, 4), torch.zeros(1, 6, 3, 4))}, ValueError, "shapes"),
    ],
)
def test_what_does_not_fit_is_refused(cache, kind, message):
    with pytest.raises(kind, match=message):
        check(**cache)


def test_a_network_that_is_not_loaded_is_not_asked():
    check(config=None, block_9=())
