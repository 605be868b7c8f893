"""Host memory for the weights of blocks."""

from __future__ import annotations

import pytest
import torch

from diffsynth.core.vram import block_weights
from diffsynth.core.vram.block_weights import PinnedPool


@pytest.mark.parametrize("sizes", [[700] * 40, [1], [0, 5, 0], [2**20, 3, 2**20 + 1, 17], list(range(1, 200))])
def test_a_pool_gives_every_block_memory_of_its_own(sizes: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    slabs: list[int] = []

    def slab(size: int, device: torch.device, pin: bool = True) -> torch.Tensor:
        slabs.append(size)
        return torch.zeros(size, dtype=torch.uint8)

    monkeypatch.setattr(block_weights, "host_memory", slab)
    pool = PinnedPool(sizes, torch.device("meta"))
    taken = [pool.take(size) for size in sizes]
    for number, memory in enumerate(taken):
        memory.fill_(number % 251)
    assert [memory.numel() for memory in taken] == sizes
    assert all(bool((memory == number % 251).all()) for number, memory in enumerate(taken))
    assert all(size & (size - 1) == 0 for size in slabs)
    if len(sizes) > 4:
        assert sum(slabs) < 1.3 * sum(sizes)
