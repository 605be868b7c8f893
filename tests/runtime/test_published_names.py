"""Weights under published names are loaded into a component by torch's own `load_state_dict`."""

from __future__ import annotations

import copy

import pytest
import torch

import diffsynth
from diffsynth.testing import tiny_hub
from flux1_oracles import oracle_dit


@pytest.fixture(scope="module")
def hub(tmp_path_factory):
    root = tmp_path_factory.mktemp("hub")
    tiny_hub(root, "flux.1-dev")
    return root


@pytest.fixture
def load(hub, monkeypatch):
    monkeypatch.setenv("DIFFSYNTH_MODEL_BASE_PATH", str(hub))
    monkeypatch.setenv("DIFFSYNTH_SKIP_DOWNLOAD", "true")
    return lambda **options: diffsynth.load("flux.1-dev", device="cpu", torch_dtype=torch.float32, **options)


def test_names_of_diffusers(load):
    """Fused weights and reordered halves, besides renamed ones."""
    pipe = load()
    config = pipe.dit.config
    oracle = oracle_dit(config)
    dit = copy.deepcopy(pipe.dit)
    dit.load_state_dict({f"model.{key}": tensor for key, tensor in oracle.state_dict().items()})
    latents, text = torch.randn(1, config.latent_channels, 8, 8), torch.randn(1, 5, config.context_dim)
    pooled, sigma, guidance = torch.randn(1, config.pooled_dim), torch.tensor([0.4]), torch.tensor([3.5])
    with torch.no_grad():
        changed, before = (net(latents, sigma, text, pooled, guidance) for net in (dit, pipe.dit))
    assert not torch.allclose(changed, before)
    weights = oracle.state_dict()
    assert torch.equal(
        dit.double_blocks[0].img_attn.qkv.weight,
        torch.cat([weights[f"transformer_blocks.0.attn.to_{part}.weight"] for part in "qkv"]),
    )


def test_own_names_and_other_networks_are_left_to_torch(load):
    dit = load().dit
    halves = {key: tensor / 2 for key, tensor in dit.state_dict().items()}
    dit.load_state_dict(halves)
    assert all(torch.equal(dit.state_dict()[key], tensor) for key, tensor in halves.items())
    with pytest.raises(RuntimeError, match="Unexpected key.*nothing"):
        dit.load_state_dict({"nothing.weight": torch.ones(2)})
    with pytest.raises(RuntimeError, match="Missing key.*img_in"):
        dit.load_state_dict({key: tensor for key, tensor in halves.items() if not key.startswith("img_in")})


def test_weights_on_disk_are_not_replaced_in_silence(load):
    """torch copied to meta tensors, with a warning alone."""
    dit = load(policy="disk").dit
    with pytest.raises(ValueError, match="its weights are on disk.*ModelConfig"):
        dit.load_state_dict({key: torch.ones(tensor.shape) for key, tensor in dit.state_dict().items()})
