"""More keys and values: attention over both, of one item or of the batch, with a mask and without."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from diffsynth.core.attention import attention
from diffsynth.models.keys_values import MoreKeysValues

BLOCK, OTHER = ("blocks", 0), ("blocks", 1)


@dataclass(frozen=True)
class Stream:
    attend: Callable[[tuple[str, int]], Callable[..., Tensor]]


def attend(q, k, v, mask=None):
    return attention(q, k, v, mask=mask)


def drawn(batch, tokens):
    return torch.randn(batch, tokens, 2, 8)


@pytest.mark.parametrize("items", [1, 2])
@pytest.mark.parametrize("masked", [False, True])
def test_blocks_attend_to_more(items, masked):
    torch.manual_seed(0)
    q, k, v, keys, values = (drawn(2, 3), drawn(2, 3), drawn(2, 3), drawn(items, 2), drawn(items, 2))
    mask = torch.tensor([[True, True, False], [True, False, True]])[:, None, None]
    stream = MoreKeysValues({BLOCK: (keys, values)})(None, Stream(lambda block: attend))
    found = stream.attend(BLOCK)(q, k, v, *([mask] if masked else []))
    for item in range(2):
        kept = mask[item, 0, 0] if masked else torch.ones(3, dtype=torch.bool)
        own = (each[item : item + 1][:, kept] for each in (k, v))
        more = (each[item % items][None] for each in (keys, values))
        pairs = (torch.cat(each, dim=1) for each in zip(own, more, strict=True))
        torch.testing.assert_close(found[item : item + 1], attention(q[item : item + 1], *pairs))


def test_other_blocks_attend_as_before():
    stream = MoreKeysValues({BLOCK: (drawn(1, 2), drawn(1, 2))})(None, Stream(lambda block: attend))
    assert stream.attend(OTHER) is attend
