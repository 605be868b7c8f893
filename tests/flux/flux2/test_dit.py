"""Flux2DiT: extensions, gradients, and calls that are refused."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from diffsynth.core.attention import attention
from diffsynth_flux.flux2.config import TINY_DIT, Flux2DiTConfig, infer_dit_config, tiny_dit_inputs
from diffsynth_flux.flux2.dit import Flux2DiT
from diffsynth_flux.flux2.extension import Network, Stream, image_positions


@pytest.fixture(scope="module")
def dit() -> Flux2DiT:
    torch.manual_seed(0)
    return Flux2DiT(TINY_DIT).eval()


def inputs(config: Flux2DiTConfig = TINY_DIT) -> dict[str, Tensor | None]:
    return tiny_dit_inputs(config, torch.Generator().manual_seed(0))


@torch.no_grad()
def test_an_extension_that_changes_nothing_changes_no_bit(dit) -> None:
    def again(network: Network, stream: Stream) -> Stream:
        stream = network.set_positions(stream, stream.positions)
        stream = stream.with_residual("single_transformer_blocks", 1, torch.zeros_like)
        return replace(stream, attend=lambda block: attention)

    assert torch.equal(dit(**inputs(), extensions=[again]), dit(**inputs()))


@torch.no_grad()
def test_residuals_are_added_after_their_blocks(dit) -> None:
    seen: dict[str, tuple[int, ...]] = {}

    def record(name: str):
        def residual(tokens: Tensor) -> Tensor:
            seen[name] = tuple(tokens.shape)
            return 0.5 * tokens

        return residual

    def extend(network: Network, stream: Stream) -> Stream:
        stream = stream.with_residual("transformer_blocks", 0, record("double"))
        return stream.with_residual("single_transformer_blocks", 1, record("single"))

    changed = dit(**inputs(), extensions=[extend])
    assert seen == {"double": (2, 15, 64), "single": (2, 22, 64)}
    assert not torch.allclose(changed, dit(**inputs()))


@torch.no_grad()
def test_every_block_has_its_own_attention(dit) -> None:
    seen = []

    def extend(network: Network, stream: Stream) -> Stream:
        def attend(block):
            seen.append(block)
            return stream.attend(block)

        return replace(stream, attend=attend)

    assert torch.equal(dit(**inputs(), extensions=[extend]), dit(**inputs()))
    assert seen == [(stack, n) for stack in ("transformer_blocks", "single_transformer_blocks") for n in range(2)]


@torch.no_grad()
def test_appended_images_are_dropped_at_the_end_and_seen_at_their_time(dit) -> None:
    image = torch.randn(1, TINY_DIT.in_channels, 2, 4, generator=torch.Generator().manual_seed(1))

    def append(time: int):
        def extend(network: Network, stream: Stream) -> Stream:
            stream = network.append_images(stream, {time: image})
            assert torch.equal(stream.positions[0, -8:], image_positions((2, 4), time=time))
            return stream

        return extend

    near, far = (dit(**inputs(), extensions=[append(time)]) for time in (10, 20))
    assert near.shape == far.shape == inputs()["latents"].shape
    assert not torch.allclose(near, far)


@pytest.mark.parametrize(
    ("stack", "block", "message"),
    [
        ("single_blocks", 0, "names the stack 'single_blocks': expected one of transformer_blocks, single_"),
        ("transformer_blocks", 2, "names block 2 of transformer_blocks, which has 2 blocks"),
    ],
)
def test_unknown_blocks_are_refused(dit, stack, block, message) -> None:
    with pytest.raises(ValueError, match=message):
        dit(**inputs(), extensions=[lambda network, stream: stream.with_residual(stack, block, torch.zeros_like)])


def test_guidance_must_fit_the_network(dit) -> None:
    with pytest.raises(ValueError, match="takes a guidance scale, such as 4"):
        dit(**inputs() | {"guidance": None})
    klein = Flux2DiT(replace(TINY_DIT, embeds_guidance=False))
    with pytest.raises(ValueError, match="takes no guidance scale; pass None"):
        klein(**inputs())


def test_checkpointing_gives_the_same_gradients() -> None:
    gradients = []
    for checkpointing in (False, True):
        torch.manual_seed(0)
        dit = Flux2DiT(TINY_DIT)
        dit.gradient_checkpointing = checkpointing
        dit(**inputs()).square().mean().backward()
        gradients.append({name: parameter.grad for name, parameter in dit.named_parameters()})
    assert all(float(gradient.abs().sum()) > 0 for gradient in gradients[0].values())
    assert all(torch.equal(gradients[0][name], gradients[1][name]) for name in gradients[0])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"transformer_blocks.0.attn.norm_q.weight": (12,)}, "head dimension 12: expected a multiple of 8"),
        ({"single_transformer_blocks.0.attn.to_qkv_mlp_proj.weight": (400, 64)}, "400 outputs; expected 384"),
    ],
)
def test_other_networks_are_not_taken_for_this_one(dit, changes, message) -> None:
    shapes = {name: tuple(tensor.shape) for name, tensor in dit.state_dict().items()}
    assert infer_dit_config(shapes) == TINY_DIT
    with pytest.raises(ValueError, match=message):
        infer_dit_config(shapes | changes)


def test_sizes_that_do_not_fit_are_refused() -> None:
    with pytest.raises(ValueError, match="n_heads=5 must divide dim=64"):
        replace(TINY_DIT, n_heads=5)
    with pytest.raises(ValueError, match=r"axes_dims=\(4, 4, 4, 6\) must be even and sum to"):
        replace(TINY_DIT, axes_dims=(4, 4, 4, 6))
