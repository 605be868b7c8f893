"""Qwen3TextEncoder equals transformers' Qwen3Model, loaded from the published key names."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from transformers import Qwen3Config, Qwen3Model

import parity
from diffsynth.models.config import TINY_QWEN3_TEXT_ENCODER as CONFIG
from diffsynth.models.qwen3 import Qwen3TextEncoder

ALL = (1, -2, -1)


def build_pair() -> tuple[Qwen3TextEncoder, Qwen3Model]:
    oracle = Qwen3Model(
        Qwen3Config(
            hidden_size=CONFIG.hidden_size,
            num_hidden_layers=CONFIG.num_layers,
            num_attention_heads=CONFIG.num_heads,
            num_key_value_heads=CONFIG.num_kv_heads,
            head_dim=CONFIG.head_dim,
            intermediate_size=CONFIG.intermediate_size,
            vocab_size=CONFIG.vocab_size,
            rms_norm_eps=1e-6,
            rope_parameters={"rope_type": "default", "rope_theta": 1e6},
            attn_implementation="eager",
        )
    ).eval()
    with torch.device("meta"):
        ours = Qwen3TextEncoder(CONFIG).eval()
    weights = parity.draw_weights(parity.shapes_of(oracle))
    oracle.load_state_dict(weights)
    published = {f"model.{name}": weight for name, weight in weights.items()}
    ours.load_state_dict(published, assign=True)
    return ours, oracle


def draw_inputs(*, padding: str = "right") -> tuple[torch.Tensor, torch.Tensor]:
    ids = torch.randint(CONFIG.vocab_size, (2, 21), generator=torch.Generator().manual_seed(1))
    mask = (torch.arange(21) < torch.tensor([[21], [8]])).long()
    return ids, mask if padding == "right" else mask.flip(1)


def run_oracle(
    oracle: Qwen3Model, ids: torch.Tensor, mask: torch.Tensor | None, layers: Sequence[int] = (-2,)
) -> torch.Tensor:
    states = oracle(input_ids=ids, attention_mask=mask, output_hidden_states=True).hidden_states
    return torch.cat([states[layer] for layer in layers], dim=-1)


@pytest.mark.parametrize("layers", [(-2,), (-1,), ALL, (0, 2)])
@torch.no_grad()
def test_equals_transformers(layers: tuple[int, ...]) -> None:
    ours, oracle = build_pair()
    ids, _ = draw_inputs()
    error = parity.relative_error(ours(ids, layers=layers), run_oracle(oracle, ids, None, layers))
    assert error <= parity.TOLERANCE


@pytest.mark.parametrize("padding", ["right", "left"])
@torch.no_grad()
def test_equals_transformers_where_the_mask_is_set(padding: str) -> None:
    ours, oracle = build_pair()
    ids, mask = draw_inputs(padding=padding)
    got, truth = ours(ids, mask, layers=ALL), run_oracle(oracle, ids, mask, ALL)
    assert bool(got.isfinite().all())
    assert parity.relative_error(got[mask.bool()], truth[mask.bool()]) <= parity.TOLERANCE


def test_every_parameter_matters() -> None:
    _, oracle = build_pair()
    ids = torch.arange(CONFIG.vocab_size)[None]
    assert parity.neutral_parameters(oracle, lambda: run_oracle(oracle, ids, None, ALL)) == []


@torch.no_grad()
def test_bf16_is_as_good_as_the_oracles() -> None:
    ours, oracle = build_pair()
    ids, _ = draw_inputs()
    truth = run_oracle(oracle, ids, None)
    theirs = parity.relative_error(run_oracle(oracle.bfloat16(), ids, None), truth)
    assert parity.relative_error(ours.bfloat16()(ids), truth) <= 1.5 * theirs


def test_layers_behind_the_last_one_read_do_not_run() -> None:
    ours, _ = build_pair()
    ids, _ = draw_inputs()
    last = ours.model.layers[-1]
    last.forward = None  # type: ignore[assignment]
    assert ours(ids).shape == (2, 21, CONFIG.hidden_size)


def test_gradients_reach_the_embedding() -> None:
    ours, _ = build_pair()
    ours(*draw_inputs()).square().mean().backward()
    assert float(ours.model.embed_tokens.weight.grad.abs().sum()) > 0


def test_unknown_layer_is_refused() -> None:
    ours, _ = build_pair()
    with pytest.raises(ValueError, match=r"layers=\(4,\); expected indices from -4 to 3"):
        ours(draw_inputs()[0], layers=(4,))


def test_drawn_weights_keep_the_scale_of_the_stream() -> None:
    torch.manual_seed(0)
    encoder = Qwen3TextEncoder(CONFIG)
    encoder.init_weights()
    token_ids = torch.arange(16)[None] % CONFIG.vocab_size
    with torch.no_grad():
        first, last = (encoder(token_ids, layers=(layer,)) for layer in (0, CONFIG.num_layers - 1))
    assert first.std().item() == pytest.approx(1, abs=0.1)
    assert 0.1 < (last - first).std().item() < 10, "layers neither vanish nor take over"
