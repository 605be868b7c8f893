"""ZImageDiT: options, sizes, training."""

from __future__ import annotations

import gzip
import json
from importlib.resources import files

import pytest
import torch

import parity
from diffsynth_zimage.config import TINY_DIT, ZImageDiTConfig, infer_dit_config, tiny_dit_inputs
from diffsynth_zimage.dit import ZImageDiT


def build(config: ZImageDiTConfig = TINY_DIT) -> ZImageDiT:
    dit = ZImageDiT(config)
    dit.load_state_dict(parity.draw_weights(parity.shapes_of(dit)))
    return dit


def inputs() -> dict[str, torch.Tensor]:
    return tiny_dit_inputs(TINY_DIT, torch.Generator().manual_seed(0))


def published_shapes() -> dict[str, tuple[int, ...]]:
    packed = files("diffsynth_zimage").joinpath("layouts/z_image_turbo_dit.json.gz").read_bytes()
    return {name: tuple(shape) for name, shape in json.loads(gzip.decompress(packed))["tensors"].items()}


def test_official_size_has_the_published_layout() -> None:
    with torch.device("meta"):
        assert parity.shapes_of(ZImageDiT(ZImageDiTConfig())) == published_shapes()


def test_shapes_tell_the_config() -> None:
    assert infer_dit_config(published_shapes()) == ZImageDiTConfig()
    assert infer_dit_config(parity.shapes_of(build())) == TINY_DIT


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"siglip_pad_token": (1, 3840)}, "Omni variant"),
        ({"layers.0.feed_forward.w1.weight": (9999, 3840)}, "feed-forward width 9999: expected 8/3 of 3840, 10240"),
        ({"all_x_embedder.4-1.weight": (3840, 256)}, "2 patch embedders"),
        ({"layers.0.attention.norm_q.weight": (100,)}, "head dimension 100"),
    ],
)
def test_other_variants_are_refused(changes: dict[str, tuple[int, ...]], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        infer_dit_config(published_shapes() | changes)


def test_axes_that_do_not_fill_a_head_are_refused() -> None:
    with pytest.raises(ValueError, match=r"axes_dims=\(32, 48, 48\) must be even and sum to dim / n_heads = 64"):
        ZImageDiTConfig(dim=256, n_heads=4, n_kv_heads=4)


def test_odd_latents_are_refused() -> None:
    with pytest.raises(ValueError, match="latents are 7x6; expected multiples of the patch size 2"):
        build()(torch.zeros(1, 16, 7, 6), torch.zeros(1), torch.zeros(1, 3, 32))


@torch.no_grad()
def test_no_mask_is_a_mask_of_ones() -> None:
    dit, arguments = build(), inputs()
    arguments["prompt_mask"][:] = True
    with_ones = dit(**arguments)
    assert torch.equal(dit(**arguments | {"prompt_mask": None}), with_ones)


@torch.no_grad()
def test_a_sample_does_not_depend_on_its_neighbours() -> None:
    dit, arguments = build(), inputs()
    together = dit(**arguments)
    for row in range(2):
        alone = dit(**{name: tensor[row : row + 1] for name, tensor in arguments.items()})
        assert parity.relative_error(together[row : row + 1], alone) < 1e-5


@torch.no_grad()
def test_masked_tokens_are_ignored() -> None:
    dit, arguments = build(), inputs()
    before = dit(**arguments)
    arguments["prompt_embeds"][~arguments["prompt_mask"]] = 1e6
    assert torch.equal(dit(**arguments), before)


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


def test_training_from_scratch_starts_at_zero_and_leaves_it() -> None:
    dit = ZImageDiT(TINY_DIT)
    dit.init_weights()
    optimizer = torch.optim.SGD(dit.parameters(), lr=0.1)
    target = torch.ones(2, 16, 6, 10)
    losses = []
    for _ in range(4):
        out = dit(**inputs())
        losses.append(float((out - target).square().mean().detach()))
        optimizer.zero_grad()
        (out - target).square().mean().backward()
        optimizer.step()
    assert losses[0] == 1.0
    assert losses == sorted(losses, reverse=True)


def test_autocast_keeps_the_stream_in_fp32() -> None:
    dit, arguments = build(), inputs()
    seen = []
    dit.layers[0].register_forward_hook(lambda module, arguments, output: seen.append(output.dtype))
    with torch.autocast("cpu", torch.bfloat16):
        out = dit(**arguments)
    assert seen == [torch.float32]
    assert out.dtype == torch.float32
    assert parity.relative_error(out, dit(**arguments)) < 0.05


def test_grouped_key_heads() -> None:
    """Two key heads equal four key heads with repeated weights; no published file has fewer key heads than heads."""
    grouped_config = ZImageDiTConfig(**{**vars(TINY_DIT), "n_kv_heads": 2})
    grouped, full = build(grouped_config), ZImageDiT(TINY_DIT)
    weights = grouped.state_dict()
    for name in weights:
        if name.endswith(("to_k.weight", "to_v.weight")):
            weights[name] = weights[name].unflatten(0, (2, 16)).repeat_interleave(2, dim=0).flatten(0, 1)
    full.load_state_dict(weights)
    assert infer_dit_config(parity.shapes_of(grouped)) == grouped_config
    with torch.no_grad():
        assert parity.relative_error(grouped(**inputs()), full(**inputs())) < 1e-5


def test_blocks_compile_whole() -> None:
    dit, arguments = build(), inputs()
    with torch.no_grad():
        truth = dit(**arguments)
        for block in (*dit.noise_refiner, *dit.context_refiner, *dit.layers):
            block.compile(fullgraph=True, backend="eager")
        assert parity.relative_error(dit(**arguments), truth) < 1e-5
