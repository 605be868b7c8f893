"""FluxDiT's extensions, positions and refusals."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from diffsynth_flux.flux1.config import TINY_DIT
from diffsynth_flux.flux1.dit import FluxDiT, grid_positions, patchify
from diffsynth_flux.flux1.extension import with_image_tokens
from diffsynth_flux.flux1.tiny import tiny_dit_inputs
from parity import draw_weights, relative_error, shapes_of


@pytest.fixture(scope="module")
def dit() -> FluxDiT:
    network = FluxDiT(TINY_DIT).eval().requires_grad_(False)
    network.load_state_dict(draw_weights(shapes_of(network)))
    return network


@pytest.fixture
def inputs() -> dict[str, torch.Tensor]:
    return tiny_dit_inputs(TINY_DIT, torch.Generator().manual_seed(0))


@pytest.mark.parametrize("stack", ["double_blocks", "single_blocks"])
def test_a_residual_is_added_to_the_images_tokens(dit, inputs, stack):
    seen = []

    def residual(tokens):
        seen.append(tokens.shape)
        return torch.linspace(-1, 1, tokens.shape[2]).expand_as(tokens)

    plain = dit(**inputs)
    changed = dit(**inputs, extensions=[lambda net, stream: stream.with_residual(stack, 1, residual)])
    assert seen == [(2, 15, TINY_DIT.dim)]
    assert relative_error(changed, plain) > 1e-3
    zero = dit(**inputs, extensions=[lambda net, stream: stream.with_residual(stack, 1, torch.zeros_like)])
    assert torch.equal(zero, plain)


def test_appended_image_tokens_are_attended_and_dropped(dit, inputs):
    patches = patchify(inputs["latents"][:, :, :4])

    def append(index):
        places = grid_positions(2, 5, index=index)
        return dit(**inputs, extensions=[lambda net, stream: with_image_tokens(net, stream, patches, places)])

    plain = dit(**inputs)
    assert append(1).shape == plain.shape
    assert relative_error(append(1), plain) > 1e-3
    assert relative_error(append(1), append(2)) > 1e-3


def test_a_mask_that_hides_appended_tokens_changes_nothing(dit, inputs):
    def hidden(net, stream):
        stream = with_image_tokens(net, stream, patchify(inputs["latents"]), grid_positions(3, 5, index=1))
        attended = torch.arange(stream.positions.shape[1]) < 7 + 15
        return replace(stream, mask=attended[None, None, None].expand(2, 1, len(attended), -1))

    assert relative_error(dit(**inputs, extensions=[hidden]), dit(**inputs)) < 1e-5


def test_skipped_blocks(dit, inputs):
    def skip(*blocks):
        return dit(**inputs, extensions=[lambda net, stream: replace(stream, skip_blocks=frozenset(blocks))])

    every = [(stack, index) for stack in ("double_blocks", "single_blocks") for index in range(2)]
    assert relative_error(skip(every[1]), dit(**inputs)) > 1e-3
    assert torch.isfinite(skip(*every)).all()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"latents": torch.zeros(2, 16, 5, 10)}, "latents are 5x10; expected multiples of the patch size 2"),
        ({"latents": torch.zeros(2, 4, 6, 10)}, "latents have 4 channels and condition latents 0"),
        ({"condition_latents": torch.zeros(2, 16, 6, 10)}, "condition latents 16; this network takes 16 and 0"),
        ({"guidance": None}, "takes a guidance, and none is given"),
        ({"extensions": [lambda net, stream: stream.with_residual("double_block", 0, abs)]}, "did you mean"),
        ({"extensions": [lambda net, stream: stream.with_residual("single_blocks", 2, abs)]}, "which has 2 blocks"),
    ],
)
def test_what_does_not_fit_is_refused(dit, inputs, changes, message):
    with pytest.raises(ValueError, match=message):
        dit(**{**inputs, **changes})
