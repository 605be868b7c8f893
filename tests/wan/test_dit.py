"""WanDiT: refused inputs, extension points, training, compilation."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

import parity
from diffsynth.core.attention import attention
from diffsynth_wan.config import WanDiTConfig
from diffsynth_wan.dit import WanDiT
from diffsynth_wan.extension import FramePositions, Stream
from diffsynth_wan.tiny import TINY_DIT, tiny_dit_inputs


def build(config: WanDiTConfig = TINY_DIT) -> WanDiT:
    dit = WanDiT(config)
    dit.load_state_dict(parity.draw_weights(parity.shapes_of(dit)))
    return dit.eval()


def inputs(config: WanDiTConfig = TINY_DIT) -> dict[str, Tensor]:
    return tiny_dit_inputs(config, torch.Generator().manual_seed(0))


@pytest.mark.parametrize(
    ("changes", "given", "message"),
    [
        (
            {},
            {"latents": torch.zeros(2, 16, 3, 5, 4)},
            r"latents are 3x5x4; expected multiples of the patch \(1,",
        ),
        ({"in_channels": 36}, {}, "have 16 channels together; this network takes 36, of which 16 are latents"),
        ({"image_dim": 8}, {}, "this network needs image_embeds"),
        ({}, {"image_embeds": torch.zeros(2, 7, 8)}, "no image branch; leave out image_embeds"),
        (
            {"image_dim": 8, "image_tokens": 14},
            {"image_embeds": torch.zeros(2, 7, 8)},
            "image_embeds have 7 tokens; this network has positions for 14",
        ),
    ],
)
def test_inputs_that_do_not_fit_are_refused(changes: dict, given: dict, message: str) -> None:
    dit = build(replace(TINY_DIT, **changes))
    arguments = {**inputs(), "latents": torch.zeros(2, 16, 3, 6, 4), **given}
    with pytest.raises(ValueError, match=message):
        dit(**arguments)


@torch.no_grad()
def test_a_sample_does_not_depend_on_its_neighbours() -> None:
    dit, arguments = build(), inputs()
    together = dit(**arguments)
    for row in range(2):
        alone = dit(**{name: tensor[row : row + 1] for name, tensor in arguments.items()})
        assert parity.relative_error(together[row : row + 1], alone) < 1e-5


@torch.no_grad()
def test_one_time_is_that_time_in_every_frame() -> None:
    dit, arguments = build(), inputs()
    truth = dit(**arguments)
    for runs in (3, 18):
        arguments["time"] = torch.tensor([0.3, 0.8])[:, None].expand(-1, runs)
        assert parity.relative_error(dit(**arguments), truth) < 1e-5


@torch.no_grad()
def test_a_window_stands_where_its_frames_are() -> None:
    """Attention depends on differences of positions: a common shift of all frames changes nothing, a gap does."""
    dit, arguments = build(), inputs()
    truth = dit(**arguments)
    assert parity.relative_error(dit(**arguments, extensions=[FramePositions((7, 8, 9))]), truth) < 1e-4

    def apart(dit: WanDiT, stream: Stream) -> Stream:
        _, height, width = stream.positions
        return dit.set_positions(stream, ((0, 1, 9), height, width))

    assert parity.relative_error(dit(**arguments, extensions=[apart]), truth) > 1e-3
    rotary = FramePositions((7, 8, 9))(dit, dit.embed(**arguments, image_embeds=None, condition_latents=None)).rotary
    longer = dit.embed(torch.zeros(2, 16, 10, 6, 4), arguments["time"], arguments["prompt_embeds"], None, None).rotary
    assert all(torch.equal(window, whole[:, 42:]) for window, whole in zip(rotary, longer, strict=True))


@torch.no_grad()
def test_an_extension_sees_and_changes_the_pass() -> None:
    dit, arguments = build(), inputs()
    seen: list[int] = []

    def watch(dit: WanDiT, stream: Stream) -> Stream:
        def attend(block: int):
            seen.append(block)
            return attention

        stream = replace(stream, attend=attend)
        return stream.with_residual(1, torch.zeros_like).with_residual(1, lambda tokens: tokens)

    plain, changed = dit(**arguments), dit(**arguments, extensions=[watch])
    assert seen == [0, 1]
    # The head normalises: tokens of twice the length give the same output, except for the epsilon of the norm.
    assert parity.relative_error(changed, plain) < 1e-5
    assert not torch.equal(changed, plain)


@torch.no_grad()
def test_a_skipped_block_equals_a_network_without_it() -> None:
    dit, arguments = build(), inputs()
    shorter = build(replace(TINY_DIT, num_layers=1))
    shorter.load_state_dict({k: v for k, v in dit.state_dict().items() if not k.startswith("blocks.1.")})

    def skip(dit: WanDiT, stream: Stream) -> Stream:
        return replace(stream, skip_blocks=frozenset({1}))

    assert torch.equal(dit(**arguments, extensions=[skip]), shorter(**arguments))


@torch.no_grad()
def test_tokens_may_be_sharded() -> None:
    """Sharded tokens in one process: a part of the tokens, with the keys of all tokens from another pass."""
    dit, arguments = build(), inputs()
    keys: dict[int, tuple[Tensor, Tensor]] = {}
    whole: list[Tensor] = []

    def record(dit: WanDiT, stream: Stream) -> Stream:
        def attend(block: int):
            def keep(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
                keys[block] = (k, v)
                return attention(q, k, v)

            return keep

        return replace(stream, attend=attend, join=lambda pixels: whole.append(pixels) or pixels)

    def share(dit: WanDiT, stream: Stream) -> Stream:
        def split(x: Tensor) -> Tensor:
            return x[:, 5:12]

        def join(pixels: Tensor) -> Tensor:
            return torch.cat((whole[0][:, :5], pixels, whole[0][:, 12:]), dim=1)

        cos, sin = stream.rotary
        return replace(
            stream,
            tokens=split(stream.tokens),
            rotary=(split(cos), split(sin)),
            attend=lambda block: lambda q, k, v: attention(q, *keys[block]),
            split=split,
            join=join,
        )

    truth = dit(**arguments, extensions=[record])
    assert parity.relative_error(dit(**arguments, extensions=[share]), truth) < 1e-5


def test_gradient_checkpointing_changes_no_gradient() -> None:
    dit, arguments = build(), inputs()
    gradients = []
    for switch in (False, True):
        dit.gradient_checkpointing = switch
        dit.zero_grad()
        dit(**arguments).square().mean().backward()
        gradients.append({name: parameter.grad.clone() for name, parameter in dit.named_parameters()})
    assert all(bool(gradient.abs().sum() > 0) for gradient in gradients[0].values())
    assert all(torch.equal(gradients[0][name], gradients[1][name]) for name in gradients[0])


@torch.no_grad()
def test_autocast_keeps_the_stream_in_fp32() -> None:
    dit, arguments = build(), inputs()
    seen = []
    dit.blocks[0].register_forward_hook(lambda module, arguments, output: seen.append(output.dtype))
    with torch.autocast("cpu", torch.bfloat16):
        out = dit(**arguments)
    assert seen == [torch.float32]
    assert out.dtype == torch.float32
    assert parity.relative_error(out, dit(**arguments)) < 0.05


@torch.no_grad()
def test_blocks_compile_whole() -> None:
    dit, arguments = build(), inputs()
    truth = dit(**arguments)
    for block in dit.blocks:
        block.compile(fullgraph=True, backend="eager")
    assert parity.relative_error(dit(**arguments), truth) < 1e-5


@torch.no_grad()
def test_a_network_in_bf16_answers_in_bf16() -> None:
    dit, arguments = build().bfloat16(), inputs()
    lowered = {name: x if name == "time" else x.bfloat16() for name, x in arguments.items()}
    assert dit(**lowered).dtype == torch.bfloat16
