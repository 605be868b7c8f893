"""Extensions of ZImageDiT: the fields of a stream have the effects that they document."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

import parity
from diffsynth_zimage.config import TINY_DIT, tiny_dit_inputs
from diffsynth_zimage.dit import ZImageDiT
from diffsynth_zimage.extension import STACKS, Stream

BLOCKS = [("noise_refiner", 0), ("context_refiner", 0), ("layers", 0), ("layers", 1)]


@pytest.fixture(scope="module")
def dit() -> ZImageDiT:
    dit = ZImageDiT(TINY_DIT).eval().requires_grad_(False)
    dit.load_state_dict(parity.draw_weights(parity.shapes_of(dit)))
    return dit


@pytest.fixture
def inputs() -> dict[str, Tensor]:
    """Return two images of 15 tokens, with captions that pad to 64 and to 32 tokens."""
    arguments = tiny_dit_inputs(TINY_DIT, torch.Generator().manual_seed(0))
    embeds = torch.randn(2, 40, TINY_DIT.cap_feat_dim, generator=torch.Generator().manual_seed(1))
    return arguments | {"prompt_embeds": embeds, "prompt_mask": torch.arange(40) < torch.tensor([[40], [5]])}


def hooked(dit: ZImageDiT, block: tuple[str, int], hook, inputs: dict[str, Tensor]) -> Tensor:
    """Return the output of the network with a forward hook on one block."""
    handle = getattr(dit, block[0])[block[1]].register_forward_hook(hook)
    try:
        return dit(**inputs)
    finally:
        handle.remove()


def test_extensions_that_change_nothing_change_no_bit(dit, inputs) -> None:
    plain = dit(**inputs)
    assert torch.equal(dit(**inputs, extensions=[lambda dit, stream: stream]), plain)
    later = [lambda dit, stream: stream.with_layers_extension(lambda dit, stream: stream)]
    assert torch.equal(dit(**inputs, extensions=later), plain)
    moved = [lambda dit, stream: dit.set_positions(stream, stream.positions)]
    assert torch.equal(dit(**inputs, extensions=moved), plain)


@pytest.mark.parametrize("block", BLOCKS)
def test_residuals_are_added_after_their_block(dit, inputs, block) -> None:
    def extension(dit, stream: Stream) -> Stream:
        return stream.with_residual(*block, torch.sin).with_residual(*block, torch.cos)

    def hook(module, arguments, out):
        out = out + out.sin()
        return out + out.cos()

    ours = dit(**inputs, extensions=[extension])
    assert torch.equal(ours, hooked(dit, block, hook, inputs))
    assert not torch.equal(ours, dit(**inputs))


@pytest.mark.parametrize("block", BLOCKS)
def test_skipped_blocks_return_their_input(dit, inputs, block) -> None:
    def extension(dit, stream: Stream) -> Stream:
        return replace(stream.with_residual(*block, torch.sin), skip_blocks=frozenset({block}))

    ours = dit(**inputs, extensions=[extension])
    assert torch.equal(ours, hooked(dit, block, lambda module, arguments, out: arguments[0], inputs))


def test_extensions_of_the_layers_get_refined_tokens(dit, inputs) -> None:
    seen, refined = {}, {}

    def before(dit, stream: Stream) -> Stream:
        seen["first"] = stream
        return stream.with_layers_extension(layers)

    def layers(dit, stream: Stream) -> Stream:
        seen["layers"] = stream
        return stream.with_residual("layers", 0, lambda tokens: 0.5 * tokens).with_layers_extension(last)

    def last(dit, stream: Stream) -> Stream:
        seen["last"] = stream
        return stream

    for stack in ("noise_refiner", "context_refiner"):
        hook = lambda module, arguments, out, stack=stack: refined.update({stack: out})  # noqa: E731
        handle = getattr(dit, stack)[-1].register_forward_hook(hook)
        dit(**inputs)
        handle.remove()
    ours = dit(**inputs, extensions=[before], step="step 3")
    assert torch.equal(seen["layers"].image, refined["noise_refiner"])
    assert torch.equal(seen["layers"].caption, refined["context_refiner"])
    assert torch.equal(seen["last"].joint_tokens(), torch.cat(tuple(refined.values()), dim=1))
    assert {stream.step for stream in seen.values()} == {"step 3"}
    assert seen["first"].grid == (3, 5)
    assert (seen["first"].image.shape[1], seen["first"].caption.shape[1]) == (32, 64)
    assert torch.equal(ours, hooked(dit, ("layers", 0), lambda module, arguments, out: 1.5 * out, inputs))


def test_appended_image_tokens_are_dropped_and_a_mask_hides_them(dit, inputs) -> None:
    def append(masked: bool):
        def extension(dit, stream: Stream) -> Stream:
            count, added = stream.image.shape[1], torch.ones(2, 8, TINY_DIT.dim)
            image = torch.cat((stream.image, added), dim=1)
            image_mask = (torch.arange(count + 8) < count + 8 * (not masked)).expand(2, 1, 1, -1)
            joint_mask = torch.cat((image_mask, stream.joint_mask[..., count:]), dim=-1)
            before, after = stream.positions[:, :count], stream.positions[:, count:]
            positions = torch.cat((before, torch.ones(2, 8, 3, dtype=torch.long), after), dim=1)
            stream = replace(stream, image=image, image_mask=image_mask, joint_mask=joint_mask)
            return dit.set_positions(stream, positions)

        return extension

    plain = dit(**inputs)
    assert parity.relative_error(dit(**inputs, extensions=[append(masked=True)]), plain) < 1e-5
    assert parity.relative_error(dit(**inputs, extensions=[append(masked=False)]), plain) > 1e-3


@pytest.mark.parametrize("field", ["image", "caption", "time_embed", "positions"])
def test_changed_inputs_change_the_output(dit, inputs, field) -> None:
    def extension(dit, stream: Stream) -> Stream:
        if field == "positions":
            return dit.set_positions(stream, 3 * stream.positions)
        return replace(stream, **{field: 1.5 * getattr(stream, field)})

    assert parity.relative_error(dit(**inputs, extensions=[extension]), dit(**inputs)) > 1e-3


def test_blocks_that_are_not_there_are_refused(dit, inputs) -> None:
    def residual(stack: str, index: int):
        return lambda dit, stream: stream.with_residual(stack, index, torch.sin)

    with pytest.raises(ValueError, match=r"names block 2 of layers, which has 2 blocks"):
        dit(**inputs, extensions=[residual("layers", 2)])
    with pytest.raises(ValueError, match=r"stack 'layer': expected one of .*; did you mean 'layers'\?"):
        dit(**inputs, extensions=[residual("layer", 0)])
    with pytest.raises(ValueError, match=r"names block 7 of context_refiner, which has 1 blocks"):
        dit(**inputs, extensions=[lambda dit, stream: replace(stream, skip_blocks={("context_refiner", 7)})])
    for stack in STACKS[:2]:
        late = [lambda dit, stream, stack=stack: stream.with_layers_extension(residual(stack, 0))]
        with pytest.raises(ValueError, match=f"block 0 of {stack} has run before"):
            dit(**inputs, extensions=late)
