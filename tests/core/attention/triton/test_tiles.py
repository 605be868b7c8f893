"""Block lists agree with the mask, and are computed once per mask."""

import gc
import weakref

import pytest
import torch

from diffsynth.core.attention.call import checked_call
from diffsynth.core.attention.triton.tiles import block_lists

BLOCKS = (32, 16)


def state_by_hand(allowed: torch.Tensor) -> list[list[int]]:
    """Return 2 for full, 1 for partial, 0 for empty blocks; a block past the last key is partial, one past the last
    query may be full."""
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
    allowed = checked_call(
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


def test_lists_are_cached_until_the_mask_changes_or_is_freed():
    mask = torch.zeros(1, 1, 32, 16, dtype=torch.bool)
    arguments = {"lengths": (32, 16), "limits": (-1, -1), "blocks": BLOCKS, "by_keys": False}
    first = weakref.ref(block_lists(mask, **arguments))
    assert block_lists(mask, **arguments) is first()
    mask.fill_(True)
    second = weakref.ref(block_lists(mask, **arguments))
    assert second().counts.flatten().tolist() == [1, 1]
    assert block_lists(mask, **arguments) is second()
    assert first() is None, "the lists of the old version are still cached"
    del mask
    gc.collect()
    assert second() is None, "the lists outlive their mask"


def test_lists_of_an_inference_tensor_are_not_cached():
    """It has no version counter: after a change in place, the old list was used."""
    arguments = {"lengths": (32, 16), "limits": (-1, -1), "blocks": BLOCKS, "by_keys": False}
    with torch.inference_mode():
        mask = torch.zeros(1, 1, 32, 16, dtype=torch.bool)
        assert block_lists(mask, **arguments).counts.flatten().tolist() == [0, 0]
        mask.fill_(True)
        assert block_lists(mask, **arguments).counts.flatten().tolist() == [1, 1]
