"""Our attention in transformers' models: the same results as theirs, with our choice of backend."""

from __future__ import annotations

from types import SimpleNamespace
from unittest import mock

import pytest
import torch
from transformers import AttentionInterface, Qwen3Config, Qwen3Model, T5Config
from transformers.models.t5.modeling_t5 import T5Attention

import parity
from diffsynth.core.attention import AttentionCall, register_backend, use_attention
from diffsynth.core.attention.naive import NaiveAttention
from diffsynth.core.attention.registry import BACKENDS
from diffsynth.errors import Refused
from diffsynth.models import transformers_attention
from diffsynth.models.config import TINY_QWEN3_TEXT_ENCODER
from diffsynth.models.qwen3 import Qwen3TextEncoder


def build(implementation: str, **changes: object) -> Qwen3Model:
    torch.manual_seed(0)
    sizes = {"hidden_size": 24, "num_hidden_layers": 2, "intermediate_size": 16, "vocab_size": 50, "head_dim": 8}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2}
    return Qwen3Model(Qwen3Config(**sizes, **heads, attn_implementation=implementation, **changes)).eval()


@pytest.mark.parametrize("changes", [{}, {"use_sliding_window": True, "sliding_window": 4, "max_window_layers": 0}])
@torch.no_grad()
def test_whole_models_equal_eager(changes: dict[str, object]) -> None:
    """Masks of padding and of sliding windows are interpreted as in transformers."""
    ours, oracle = build(transformers_attention.attn_implementation(), **changes), build("eager", **changes)
    ours.load_state_dict(oracle.state_dict())
    ids = torch.arange(22).reshape(2, 11)
    mask = torch.ones_like(ids)
    mask[1, 8:] = 0
    for given in (None, mask):
        got, truth = (model(input_ids=ids, attention_mask=given).last_hidden_state for model in (ours, oracle))
        assert parity.relative_error(got[mask.bool()], truth[mask.bool()]) <= parity.TOLERANCE


def attend(query: torch.Tensor, mask: torch.Tensor | None = None, **settings: object) -> torch.Tensor:
    implementation = AttentionInterface()[transformers_attention.attn_implementation()]
    module = SimpleNamespace(is_causal=True)
    return implementation(module, query, query, query, mask, **settings)[0]


def test_a_window_without_a_mask() -> None:
    q = torch.randn(1, 2, 9, 4)
    i, j = torch.arange(9)[:, None], torch.arange(9)[None, :]
    mask = ((j <= i) & (j > i - 4))[None, None]
    torch.testing.assert_close(attend(q, sliding_window=4), attend(q, mask))
    added = torch.zeros(mask.shape).masked_fill(~mask, -torch.inf)
    torch.testing.assert_close(attend(q, added), attend(q, mask))


@pytest.mark.parametrize("masked", [None, "bool", "added"])
@torch.no_grad()
def test_a_position_bias_is_added_to_the_scores(masked: str | None) -> None:
    """T5's relative positions, alone, with a bool mask and with a mask that is added."""
    config = T5Config(d_model=24, d_kv=8, num_heads=3, d_ff=16, relative_attention_num_buckets=8)
    truth = T5Attention(config, has_relative_attention_bias=True).eval()
    ours = T5Attention(config, has_relative_attention_bias=True).eval()
    ours.load_state_dict(truth.state_dict())
    truth.config._attn_implementation = "eager"
    ours.config = T5Config(**config.to_diff_dict(), attn_implementation=transformers_attention.attn_implementation())
    visible = torch.arange(9)[None, None, None] < torch.tensor([9, 5]).view(2, 1, 1, 1)
    added = torch.zeros(visible.shape).masked_fill(~visible, torch.finfo(torch.float32).min)
    mask = {None: None, "bool": visible, "added": added}[masked]
    hidden = torch.randn(2, 9, 24)
    expected = truth(hidden, None if masked is None else added)[0]
    assert parity.relative_error(ours(hidden, mask)[0], expected) <= parity.TOLERANCE


def test_what_is_not_ours_to_do_is_refused() -> None:
    q = torch.randn(1, 2, 9, 4)
    with pytest.raises(Refused, match=r"no dropout, but SimpleNamespace uses 0.1; call eval\(\) first"):
        attend(q, dropout=0.1)
    with pytest.raises(Refused, match="needs softcap=; use attn_implementation='eager'"):
        attend(q, softcap=30.0)


@mock.patch.dict(BACKENDS)
def test_a_text_encoder_follows_our_choice() -> None:
    calls: list[AttentionCall] = []

    class Spy(NaiveAttention):
        def __call__(self, call: AttentionCall) -> torch.Tensor:
            calls.append(call)
            return super().__call__(call)

    register_backend("spy", Spy(), priority=-200)
    encoder = Qwen3TextEncoder(TINY_QWEN3_TEXT_ENCODER).eval()
    ids = torch.arange(5)[None]
    encoder(ids)
    assert calls == []
    with use_attention("spy"):
        encoder(ids, layers=(-1,))
    assert len(calls) == TINY_QWEN3_TEXT_ENCODER.num_layers
    assert all(call.causal and call.q_per_kv > 1 and call.mask is None for call in calls)
