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


@pytest.mark.parametrize(("stack", "tokens"), [("double_blocks", 15), ("single_blocks", 7 + 15)])
def test_attention_of_queries_is_added_to_that_of_the_block(dit, inputs, stack, tokens):
    """The queries are normalised: without RoPE, they do not depend on the positions of the tokens."""
    seen = []

    def attend(q):
        seen.append(q)
        return torch.linspace(-1, 1, q.shape[3]).expand_as(q)

    def extension(net, stream):
        return stream.with_query_attention(stack, 0, attend)

    def moved(net, stream):
        return net.set_positions(stream, stream.positions + 3)

    plain = dit(**inputs)
    assert relative_error(dit(**inputs, extensions=[extension]), plain) > 1e-3
    assert seen[0].shape == (2, tokens, TINY_DIT.n_heads, TINY_DIT.head_dim)
    norms = getattr(dit, stack)[0]
    scale = (norms.img_attn.norm if stack == "double_blocks" else norms.norm).query_norm.scale
    assert torch.allclose((seen[0] / scale).square().mean(-1), torch.ones(()), atol=1e-3)
    if stack == "double_blocks":
        dit(**inputs, extensions=[moved, extension])
        assert torch.equal(seen[1], seen[0])

    def zero(net, stream):
        return stream.with_query_attention(stack, 0, torch.zeros_like)

    assert torch.equal(dit(**inputs, extensions=[zero]), plain)
    twice = dit(**inputs, extensions=[extension, extension])
    assert relative_error(twice, dit(**inputs, extensions=[extension])) > 1e-3


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
        ({"extensions": [lambda net, stream: stream.with_query_attention("single_block", 0, abs)]}, "did you mean"),
    ],
)
def test_what_does_not_fit_is_refused(dit, inputs, changes, message):
    with pytest.raises(ValueError, match=message):
        dit(**{**inputs, **changes})
