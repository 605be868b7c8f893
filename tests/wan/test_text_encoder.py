"""WanTextEncoder equals transformers' UMT5EncoderModel, loaded by our key rules."""

from __future__ import annotations

import pytest
import torch
from transformers import UMT5Config, UMT5EncoderModel

import parity
from diffsynth_wan.config import WanTextEncoderConfig
from diffsynth_wan.text_encoder import WanTextEncoder, relative_buckets
from diffsynth_wan.tiny import TINY_TEXT_ENCODER as CONFIG
from published_tensors import load_published

LONG = 140
"""Length of the text: longer than `max_distance`, so that every bucket is used."""

SHARED, TIED = "shared.weight", "encoder.embed_tokens.weight"


@pytest.fixture(scope="module")
def oracle() -> UMT5EncoderModel:
    model = UMT5EncoderModel(
        UMT5Config(
            vocab_size=CONFIG.vocab_size,
            d_model=CONFIG.dim,
            d_kv=CONFIG.dim_attn // CONFIG.num_heads,
            d_ff=CONFIG.dim_ffn,
            num_layers=CONFIG.num_layers,
            num_heads=CONFIG.num_heads,
            relative_attention_num_buckets=CONFIG.num_buckets,
            feed_forward_proj="gated-gelu",
            attn_implementation="eager",
        )
    )
    weights = parity.draw_weights({name: tuple(value.shape) for name, value in model.named_parameters()})
    weights[SHARED] = weights[SHARED] * CONFIG.dim**0.5
    assert model.eval().load_state_dict(weights, strict=False).unexpected_keys == []
    return model


def published(oracle: UMT5EncoderModel, *names: str) -> dict[str, torch.Tensor]:
    """Return the tensors of a file, with the embedding under one of its two names or under both."""
    state = {name: value for name, value in oracle.state_dict().items() if name not in (SHARED, TIED)}
    return state | dict.fromkeys(names, oracle.shared.weight)


@pytest.fixture(scope="module")
def ours(oracle: UMT5EncoderModel) -> WanTextEncoder:
    return load_published(published(oracle, SHARED), expect="wan_text_encoder/transformers")


def draw_inputs() -> tuple[torch.Tensor, torch.Tensor]:
    ids = torch.randint(CONFIG.vocab_size, (2, LONG), generator=torch.Generator().manual_seed(1))
    return ids, (torch.arange(LONG) < torch.tensor([[LONG], [8]])).long()


@torch.no_grad()
def test_equals_transformers(ours, oracle):
    ids, mask = draw_inputs()
    got, truth = ours(ids, mask), oracle(ids, mask).last_hidden_state
    assert parity.relative_error(got[mask.bool()], truth[mask.bool()]) <= parity.TOLERANCE
    assert parity.relative_error(ours(ids), oracle(ids).last_hidden_state) <= parity.TOLERANCE
    assert bool(got.isfinite().all())


def test_every_parameter_matters(oracle):
    ids, mask = torch.arange(CONFIG.vocab_size)[None], None
    assert parity.neutral_parameters(oracle, lambda: oracle(ids, mask).last_hidden_state) == []


@pytest.mark.parametrize(
    ("names", "layout"),
    [((TIED,), "wan_text_encoder/transformers_tied"), ((SHARED, TIED), "wan_text_encoder/transformers")],
)
def test_the_embedding_under_either_name(ours, oracle, names, layout):
    again = load_published(published(oracle, *names), expect=layout)
    assert torch.equal(again.token_embedding.weight, ours.token_embedding.weight)


def test_our_own_names_are_the_published_ones(ours):
    again = load_published(ours.state_dict(), expect="wan_text_encoder")
    ids, mask = draw_inputs()
    assert torch.equal(again(ids, mask), ours(ids, mask))


@torch.no_grad()
def test_bf16_is_as_good_as_the_oracles(ours, oracle):
    ids, mask = draw_inputs()
    seen = mask.bool()
    truth = oracle(ids, mask).last_hidden_state[seen]
    low = UMT5EncoderModel(oracle.config).eval()
    low.load_state_dict(oracle.state_dict())
    theirs = parity.relative_error(low.bfloat16()(ids, mask).last_hidden_state[seen], truth)
    mine = WanTextEncoder(CONFIG)
    mine.load_state_dict(ours.state_dict())
    assert parity.relative_error(mine.bfloat16()(ids, mask)[seen], truth) <= 1.5 * theirs


def test_padding_changes_no_text(ours):
    ids, _ = draw_inputs()
    short = ids[:, :9]
    padded = torch.nn.functional.pad(short, (0, 6), value=3)
    mask = (torch.arange(15) < 9).long().expand(2, -1)
    assert parity.relative_error(ours(padded, mask)[:, :9], ours(short)) < 1e-5


def test_buckets():
    config = WanTextEncoderConfig()
    buckets = relative_buckets(200, config=config)
    assert buckets[50, 50] == 0
    assert buckets[50, 49] == 1  # an earlier key
    assert buckets[50, 51] == 17  # a later key
    assert buckets[150, 0] == buckets[199, 0] == 15
    assert buckets[0, 150] == 31
    assert set(buckets.flatten().tolist()) == set(range(32)) - {16}
