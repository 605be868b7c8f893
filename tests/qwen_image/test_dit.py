"""QwenImageDiT: extensions, positions, gradients, and calls that are refused."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

import parity
from diffsynth_qwen_image.config import TINY_DIT, infer_dit_config, tiny_dit_inputs
from diffsynth_qwen_image.dit import QwenImageDiT
from diffsynth_qwen_image.extension import Network, Stream, attend_masked, image_positions


@pytest.fixture(scope="module")
def dit() -> QwenImageDiT:
    dit = QwenImageDiT(TINY_DIT).eval()
    dit.load_state_dict(parity.draw_weights(parity.shapes_of(dit)))
    return dit


def inputs() -> dict[str, Tensor]:
    return tiny_dit_inputs(TINY_DIT, torch.Generator().manual_seed(0))


@torch.no_grad()
def test_an_extension_that_changes_nothing_changes_no_bit(dit) -> None:
    def again(network: Network, stream: Stream) -> Stream:
        stream = network.set_positions(stream, stream.positions)
        stream = stream.with_residual("transformer_blocks", 1, torch.zeros_like)
        return replace(stream, attend=lambda block: attend_masked)

    assert torch.equal(dit(**inputs(), extensions=[again]), dit(**inputs()))


@torch.no_grad()
def test_residuals_are_added_to_the_tokens_of_the_images(dit) -> None:
    seen = []

    def residual(tokens: Tensor) -> Tensor:
        seen.append(tuple(tokens.shape))
        return 0.5 * tokens

    def extend(network: Network, stream: Stream) -> Stream:
        return stream.with_residual("transformer_blocks", 0, residual)

    assert not torch.allclose(dit(**inputs(), extensions=[extend]), dit(**inputs()))
    assert seen == [(2, 15, 64)]


@torch.no_grad()
def test_every_block_has_its_own_attention(dit) -> None:
    seen = []

    def extend(network: Network, stream: Stream) -> Stream:
        def attend(block):
            seen.append(block)
            return stream.attend(block)

        return replace(stream, attend=attend)

    assert torch.equal(dit(**inputs(), extensions=[extend]), dit(**inputs()))
    assert seen == [("transformer_blocks", 0), ("transformer_blocks", 1)]


@torch.no_grad()
def test_images_are_appended_at_once_or_one_after_the_other(dit) -> None:
    images = [torch.randn(1, 16, *size, generator=torch.Generator().manual_seed(1)) for size in ((4, 8), (16, 2))]
    streams = []

    def together(network: Network, stream: Stream) -> Stream:
        streams.append(network.append_images(stream, images))
        return streams[-1]

    def apart(network: Network, stream: Stream) -> Stream:
        for image in images:
            stream = network.append_images(stream, [image])
        streams.append(stream)
        return stream

    assert torch.equal(dit(**inputs(), extensions=[together]), dit(**inputs(), extensions=[apart]))
    first, second = streams
    assert torch.equal(first.positions, second.positions)
    assert first.positions[0, :7, 0].tolist() == list(range(4, 11))  # behind the 8 rows of the second image
    assert torch.equal(first.positions[0, -8:], image_positions((8, 1), index=2))


def test_positions_are_spread_over_those_of_another_image() -> None:
    """The corners of both images have the same positions."""
    own, spread = (image_positions((3, 2), index=1, spread_over=over) for over in (None, (5, 7)))
    assert own[:, 1:].tolist() == [[-2, -1], [-2, 0], [-1, -1], [-1, 0], [0, -1], [0, 0]]
    assert spread[:, 1:].tolist() == [[-3, -4], [-3, 2], [-1, -4], [-1, 2], [1, -4], [1, 2]]
    assert torch.equal(image_positions((3, 2), index=1, spread_over=(3, 2)), own)


@torch.no_grad()
def test_padding_and_neighbours_change_nothing(dit) -> None:
    arguments = inputs()
    together = dit(**arguments)
    arguments["prompt_embeds"][~arguments["prompt_mask"]] = 1e3
    assert torch.equal(dit(**arguments), together)
    for row, length in enumerate((7, 4)):
        alone = {name: tensor[row : row + 1] for name, tensor in arguments.items()}
        alone["prompt_embeds"], alone["prompt_mask"] = alone["prompt_embeds"][:, :length], None
        assert parity.relative_error(together[row : row + 1], dit(**alone)) < 1e-5


def test_calls_that_do_not_fit_are_refused(dit) -> None:
    with pytest.raises(ValueError, match="latents are 7x10; expected multiples of the patch size 2"):
        dit(**inputs() | {"latents": torch.zeros(2, 16, 7, 10)})
    for stack, block, message in (
        ("blocks", 0, "names the stack 'blocks': expected one of transformer_blocks"),
        ("transformer_blocks", 2, "names block 2 of transformer_blocks, which has 2 blocks"),
    ):
        with pytest.raises(ValueError, match=message):
            dit(
                **inputs(),
                extensions=[lambda _, stream, at=(stack, block): stream.with_residual(*at, torch.zeros_like)],
            )


def test_checkpointing_gives_the_same_gradients() -> None:
    gradients = []
    for checkpointing in (False, True):
        torch.manual_seed(0)
        dit = QwenImageDiT(TINY_DIT)
        dit.gradient_checkpointing = checkpointing
        dit(**inputs()).square().mean().backward()
        gradients.append({name: each.grad for name, each in dit.named_parameters() if each.grad is not None})
    assert gradients[0].keys() == gradients[1].keys()
    without = {name for name, _ in dit.named_parameters()} - gradients[0].keys()
    assert all(
        name.startswith(("transformer_blocks.1.txt_mlp", "transformer_blocks.1.attn.to_add_out")) for name in without
    )
    assert all(torch.equal(gradients[0][name], gradients[1][name]) for name in gradients[0])


def test_autocast_keeps_the_stream_in_fp32(dit) -> None:
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        out = dit(**inputs())
    assert out.dtype == torch.float32
    with torch.no_grad():
        assert parity.relative_error(out, dit(**inputs())) < 0.05


def test_blocks_compile_whole(dit) -> None:
    compiled = QwenImageDiT(TINY_DIT).eval()
    compiled.load_state_dict(dit.state_dict())
    for block in compiled.transformer_blocks:
        block.compile(fullgraph=True, backend="eager")
    with torch.no_grad():
        assert parity.relative_error(compiled(**inputs()), dit(**inputs())) < 1e-5


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"transformer_blocks.0.attn.norm_q.weight": (24,)}, "head dimension 24: expected a multiple of 32"),
        ({"proj_out.weight": (60, 64)}, "patches of 64 values at the input and 60 at the output"),
    ],
)
def test_other_networks_are_not_taken_for_this_one(dit, changes, message) -> None:
    assert infer_dit_config(parity.shapes_of(dit)) == TINY_DIT
    with pytest.raises(ValueError, match=message):
        infer_dit_config(parity.shapes_of(dit) | changes)


def test_sizes_that_do_not_fit_are_refused() -> None:
    with pytest.raises(ValueError, match="n_heads=5 must divide dim=64"):
        replace(TINY_DIT, n_heads=5)
    with pytest.raises(ValueError, match=r"axes_dims=\(4, 14, 15\) must be even and sum to"):
        replace(TINY_DIT, axes_dims=(4, 14, 15))
