"""CLIP and T5 equal transformers' models, from files of every naming."""

from __future__ import annotations

import pytest
import torch
from transformers import CLIPTextConfig, CLIPTextModel, T5Config, T5EncoderModel

import parity
from diffsynth_flux.flux1.config import TINY_CLIP, TINY_T5
from flux1_oracles import load_tensors

IDS = torch.tensor([[5, 40, 299, 3, 3, 3], [7, 12, 30, 200, 210, 299]])


def oracle_clip() -> CLIPTextModel:
    config = CLIPTextConfig(
        hidden_size=TINY_CLIP.hidden_size,
        num_hidden_layers=TINY_CLIP.num_layers,
        num_attention_heads=TINY_CLIP.num_heads,
        intermediate_size=TINY_CLIP.intermediate_size,
        vocab_size=TINY_CLIP.vocab_size,
        eos_token_id=TINY_CLIP.vocab_size - 1,
        attn_implementation="eager",
    )
    return with_weights(CLIPTextModel(config))


def oracle_t5() -> T5EncoderModel:
    config = T5Config(
        d_model=TINY_T5.hidden_size,
        d_kv=TINY_T5.head_dim,
        d_ff=TINY_T5.intermediate_size,
        num_layers=TINY_T5.num_layers,
        num_heads=TINY_T5.num_heads,
        vocab_size=TINY_T5.vocab_size,
        relative_attention_num_buckets=TINY_T5.num_buckets,
        feed_forward_proj="gated-gelu",
        attn_implementation="eager",
    )
    return with_weights(T5EncoderModel(config))


def with_weights(module: torch.nn.Module) -> torch.nn.Module:
    """Return the module with random weights; position biases have a standard deviation of 1."""
    shapes = {name: tuple(parameter.shape) for name, parameter in module.named_parameters()}
    weights = parity.draw_weights(shapes)
    for name, weight in weights.items():
        if "relative_attention_bias" in name or "embedding" in name or name == "shared.weight":
            weight.copy_(torch.randn(weight.shape, generator=torch.Generator().manual_seed(3)))
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            parameter.copy_(weights[name])
    return module.eval()


def clip_files() -> dict[str, dict[str, torch.Tensor]]:
    """Return the tensors of CLIP as published, as transformers 5 names them, and as other programs write them."""
    new = {name: tensor for name, tensor in oracle_clip().state_dict().items() if "position_ids" not in name}
    old = {f"text_model.{name}": tensor for name, tensor in new.items()}
    unused = {
        "text_model.embeddings.position_ids": torch.arange(77)[None],
        "text_projection.weight": torch.ones(4, TINY_CLIP.hidden_size),
        "logit_scale": torch.ones(()),
    }
    packed = {f"text_encoders.clip_l.transformer.{name}": tensor for name, tensor in old.items()}
    return {"old": old, "new": new, "with more": old | unused, "all in one": packed}


@pytest.mark.parametrize("naming", ["old", "new", "with more", "all in one"])
@torch.no_grad()
def test_clip(naming: str) -> None:
    found, ours = load_tensors(clip_files()[naming])
    assert (found.architecture.name, found.config) == ("clip_text_encoder", TINY_CLIP)
    expected = oracle_clip()(IDS).pooler_output
    assert parity.relative_error(ours(IDS), expected) <= parity.TOLERANCE
    assert parity.relative_error(ours(IDS[:1]), expected[:1]) <= parity.TOLERANCE


@pytest.mark.parametrize("naming", ["published", "twice", "other name", "with the decoder", "all in one"])
@torch.no_grad()
def test_t5(naming: str) -> None:
    oracle = oracle_t5()
    state = {name: tensor for name, tensor in oracle.state_dict().items() if name != "encoder.embed_tokens.weight"}
    embeddings = {"encoder.embed_tokens.weight": state["shared.weight"]}
    tensors = {
        "published": state,
        "twice": state | embeddings,
        "other name": {name: tensor for name, tensor in (state | embeddings).items() if name != "shared.weight"},
        "with the decoder": state | {"decoder.block.0.layer.0.layer_norm.weight": torch.ones(3), "lm_head.weight": IDS},
        "all in one": {f"text_encoders.t5xxl.transformer.{name}": tensor for name, tensor in state.items()},
    }[naming]
    found, ours = load_tensors(tensors)
    assert (found.architecture.name, found.config) == ("t5_text_encoder", TINY_T5)
    expected = oracle(IDS).last_hidden_state
    assert parity.relative_error(ours(IDS), expected) <= parity.TOLERANCE


@pytest.mark.parametrize("build", [oracle_clip, oracle_t5])
def test_every_parameter_matters(build) -> None:
    """Every parameter changes the output, so the comparisons above cover all of them."""
    oracle = build()
    # The bias of keys is the same for every key, which softmax removes.
    keys = [name for name, _ in oracle.named_parameters() if name.endswith("k_proj.bias")]
    key = "pooler_output" if build is oracle_clip else "last_hidden_state"
    assert parity.neutral_parameters(oracle, lambda: oracle(IDS)[key], skip=keys) == []


@pytest.mark.parametrize("build", [oracle_clip, oracle_t5])
@torch.no_grad()
def test_bf16_is_as_good_as_the_oracles(build) -> None:
    oracle = build()
    key = "pooler_output" if build is oracle_clip else "last_hidden_state"
    state = {name: tensor.clone() for name, tensor in oracle.state_dict().items() if "position_ids" not in name}
    _, ours = load_tensors(state, torch.bfloat16)
    truth = oracle(IDS)[key]
    theirs = parity.relative_error(oracle.bfloat16()(IDS)[key], truth)
    assert parity.relative_error(ours(IDS), truth) <= 1.5 * theirs
