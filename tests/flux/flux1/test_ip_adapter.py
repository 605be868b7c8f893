"""The IP-Adapter against a naive implementation inside of diffusers' transformer, and its limits."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from diffsynth_flux.flux1.config import TINY_DIT, TINY_IP_ADAPTER
from diffsynth_flux.flux1.dit import grid_positions, patchify, unpatchify
from diffsynth_flux.flux1.ip_adapter import FluxIPAdapter, ImagePrompt
from diffsynth_flux.flux1.tiny import tiny_dit_inputs, tiny_ip_adapter_inputs
from flux1_oracles import NaiveAttention, load_tensors, naive_image_prompt, oracle_dit, set_image_prompt
from parity import TOLERANCE, draw_weights, relative_error, shapes_of

DIT = replace(TINY_DIT, dim=256, n_heads=2, n_double_blocks=1, n_single_blocks=2)
ADAPTER = replace(TINY_IP_ADAPTER, dim=256)


@pytest.fixture(scope="module")
def adapter() -> FluxIPAdapter:
    found, network = load_tensors(draw_weights(shapes_of(FluxIPAdapter(ADAPTER)), seed=8))
    assert (found.architecture.name, found.config) == ("flux_ip_adapter", ADAPTER)
    return network


@pytest.fixture(scope="module")
def networks():
    oracle = oracle_dit(DIT)
    return load_tensors(oracle.state_dict())[1], oracle


@pytest.fixture
def inputs():
    return tiny_dit_inputs(DIT, torch.Generator().manual_seed(0))


def run_oracle(oracle, inputs) -> torch.Tensor:
    tokens = oracle(
        patchify(inputs["latents"]),
        inputs["prompt_embeds"],
        inputs["pooled_prompt_embeds"],
        inputs["sigma"],
        grid_positions(3, 5),
        torch.zeros(inputs["prompt_embeds"].shape[1], 3),
        inputs["guidance"],
        return_dict=False,
    )[0]
    return unpatchify(tokens, 3)


@pytest.mark.parametrize("images", [1, 2])
@torch.no_grad()
def test_equals_a_naive_implementation(adapter, networks, inputs, images):
    dit, oracle = networks
    pooled = tiny_ip_adapter_inputs(ADAPTER, torch.Generator().manual_seed(1))["pooled"][:images]
    plain = run_oracle(oracle, inputs)
    with set_image_prompt(oracle, naive_image_prompt(adapter.state_dict(), pooled), scale=0.7):
        expected = run_oracle(oracle, inputs)
    found = dit(**inputs, extensions=[ImagePrompt(adapter(pooled), 0.7)])
    assert relative_error(found, expected) < TOLERANCE
    assert relative_error(plain, expected) > 1e-2


@torch.no_grad()
def test_every_parameter_and_block_matters(adapter, networks, inputs):
    dit, _ = networks
    pooled = tiny_ip_adapter_inputs(ADAPTER, torch.Generator().manual_seed(1))["pooled"]
    expected = dit(**inputs, extensions=[ImagePrompt(adapter(pooled))])
    for name, parameter in adapter.named_parameters():
        kept = parameter.clone()
        # A norm follows the keys, so their projection is changed unevenly.
        parameter.mul_(torch.linspace(0.5, 1.5, parameter.shape[-1]))
        changed = dit(**inputs, extensions=[ImagePrompt(adapter(pooled))])
        assert relative_error(changed, expected) > 1e-3, name
        parameter.copy_(kept)


@torch.no_grad()
def test_a_scale_of_zero_changes_no_bit(adapter, networks, inputs):
    dit, _ = networks
    blocks = adapter(**tiny_ip_adapter_inputs(ADAPTER, torch.Generator().manual_seed(1)))
    assert torch.equal(dit(**inputs, extensions=[ImagePrompt(blocks, 0.0)]), dit(**inputs))


@torch.no_grad()
def test_one_token_adds_its_values(adapter, networks, inputs):
    """Attention to a single token returns its values, whatever the queries: no RoPE and no mask take part."""
    dit, _ = networks
    blocks = tuple((k[:, :1], v[:, :1]) for k, v in adapter(torch.randn(1, ADAPTER.image_dim)))

    def add_values(net, stream):
        for (stack, index), (_, values) in zip(INDICES, blocks, strict=True):
            stream = stream.with_query_attention(stack, index, lambda q, v=values: 0.3 * v.expand_as(q))
        return stream

    expected = dit(**inputs, extensions=[add_values])
    assert relative_error(dit(**inputs, extensions=[ImagePrompt(blocks, 0.3)]), expected) < 1e-5


INDICES = [("double_blocks", 0), ("single_blocks", 0), ("single_blocks", 1)]


def test_another_number_of_blocks_is_refused(adapter, networks, inputs):
    blocks = adapter(torch.randn(1, ADAPTER.image_dim))[:2]
    with pytest.raises(ValueError, match="keys and values for 2 blocks, the transformer has 3 blocks"):
        networks[0](**inputs, extensions=[ImagePrompt(blocks)])


def test_the_naive_implementation_without_an_image_is_diffusers(networks, inputs):
    _, oracle = networks
    plain = run_oracle(oracle, inputs)
    nothing = [(torch.zeros(1, 2, 1, 128), torch.zeros(1, 2, 1, 128))] * 3
    with set_image_prompt(oracle, nothing, scale=1.0):
        assert isinstance(next(iter(oracle.attn_processors.values())), NaiveAttention)
        assert relative_error(run_oracle(oracle, inputs), plain) < 1e-5
