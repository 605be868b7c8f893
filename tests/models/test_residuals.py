import pytest
import torch
from torch import nn

from diffsynth.models.residuals import ScaledHint, check_blocks, hint_of


def network():
    made = nn.Module()
    made.layers = nn.ModuleList(nn.Identity() for _ in range(2))
    return made


def test_a_hint_is_scaled_and_does_not_depend_on_the_tokens():
    assert torch.equal(ScaledHint(torch.full((1, 2, 3), 4.0), 0.5)(torch.randn(1, 2, 3)), torch.full((1, 2, 3), 2.0))


@pytest.mark.parametrize(
    ("blocks", "hints", "expected"), [(6, 3, "001122"), (5, 2, "00011"), (3, 3, "012"), (4, 1, "0000"), (2, 3, "01")]
)
def test_consecutive_blocks_share_a_hint(blocks, hints, expected):
    assert "".join(str(hint_of(block, blocks, hints)) for block in range(blocks)) == expected


def test_blocks_that_are_there():
    check_blocks(network(), [("layers", 0), ("layers", 1)], ("layers",))


@pytest.mark.parametrize(
    ("block", "message"),
    [
        (("layer", 0), "the stack 'layer': expected one of layers; did you mean 'layers'"),
        (("layers", 2), "block 2 of layers, which has 2 blocks"),
        (("layers", -1), "block -1 of layers"),
    ],
)
def test_blocks_that_are_not_there(block, message):
    with pytest.raises(ValueError, match=message):
        check_blocks(network(), [block], ("layers",))
