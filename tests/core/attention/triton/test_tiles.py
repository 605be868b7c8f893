"""Lists of blocks say of each block what the mask says, and are made once."""

import gc

import pytest
import torch

from diffsynth.core.attention.checking import check
from diffsynth.core.attention.triton import tiles
from diffsynth.core.attention.triton.tiles import block_lists

BLOCKS = (32, 16)


def state_by_hand(allowed: torch.Tensor) -> list[list[int]]:
    """2 full, 1 partial, 0 empty; what the last key cuts off is partial, what the last query does may be full."""
    rows = []
    for row in allowed.split(BLOCKS[0], dim=-2):
        blocks = row.split(BLOCKS[1], dim=-1)
        rows.append([int(x.any()) + int(x.all() and x.shape[-1] == BLOCKS[1]) for x in blocks])
    return rows


@pytest.mark.parametrize(("limits", "by_keys"), [((-1, -1), True), ((20, 0), False), ((-1, 9), True)])
def test_blocks_are_full_then_partial_and_empty_ones_are_left_out(limits, by_keys):
    mask = torch.rand(1, 2, 70, 40) < 0.9
    mask[:, :, :, 16:32], mask[:, :, 32:64, 16:32], mask[:, 0, :32] = True, False, True
    lists = block_lists(mask, (70, 40), limits, BLOCKS, by_keys=by_keys)
    window = None if limits == (-1, -1) else limits
    allowed = check(
        torch.zeros(1, 70, 2, 8), torch.zeros(1, 40, 2, 8), torch.zeros(1, 40, 2, 8), mask=mask, window=window
    )
    for head in range(2):
        state = torch.tensor(state_by_hand(allowed.allowed()[0, head]))
        for tile, row in enumerate(state.T if by_keys else state):
            full, some = lists.counts[0, head, tile].tolist()
            visited = lists.blocks[0, head, tile].tolist()
            assert sorted(visited[:full]) == [i for i, x in enumerate(row.tolist()) if x == 2]
            assert sorted(visited[full:some]) == [i for i, x in enumerate(row.tolist()) if x == 1]


def test_key_padding_has_one_list_for_all_tiles():
    mask = torch.rand(2, 1, 1, 40) < 0.5
    lists = block_lists(mask, (200, 40), (-1, -1), BLOCKS, by_keys=False)
    assert lists.counts.shape == (2, 1, 1, 2)
    assert lists.strides == (1, 0, 0)


def test_a_mask_is_looked_at_once_and_again_when_it_changed(monkeypatch):
    looks = []
    original = tiles._lists
    monkeypatch.setattr(tiles, "_lists", lambda *args: looks.append(args) or original(*args))
    mask = torch.zeros(1, 1, 32, 16, dtype=torch.bool)
    ask = {"lengths": (32, 16), "limits": (-1, -1), "blocks": BLOCKS, "by_keys": False}
    assert block_lists(mask, **ask) is block_lists(mask, **ask)
    assert len(looks) == 1
    mask.fill_(True)
    assert block_lists(mask, **ask).counts.flatten().tolist() == [1, 1]
    assert len(looks) == 2
    assert len(tiles._known[mask]) == 1
    looks.clear()
    kept = len(tiles._known)
    del mask
    gc.collect()
    assert len(tiles._known) == kept - 1


def test_an_inference_tensor_is_looked_at_each_time():
    """It has no version: changed in place, it looked the same, and the old list was used."""
    ask = {"lengths": (32, 16), "limits": (-1, -1), "blocks": BLOCKS, "by_keys": False}
    with torch.inference_mode():
        mask = torch.zeros(1, 1, 32, 16, dtype=torch.bool)
        assert block_lists(mask, **ask).counts.flatten().tolist() == [0, 0]
        mask.fill_(True)
        assert block_lists(mask, **ask).counts.flatten().tolist() == [1, 1]
