"""Prompt embeddings equal those of diffusers' pipelines (0.42), with transformers' whole models."""

from __future__ import annotations

import logging

import pytest
import torch
from diffusers import Flux2KleinPipeline, Flux2Pipeline

import parity
from diffsynth_flux.flux2.config import TINY_MISTRAL, infer_mistral_config
from diffsynth_flux.flux2.text_encoders import MistralTextEncoder
from diffsynth_flux.flux2.units import SYSTEM_MESSAGE, chat_text, encode_prompt, prompt_layers
from flux2_oracles import flux2_tokenizer, mistral_of, oracle_mistral, oracle_qwen3, qwen3_of

PROMPTS = ["a red apple on a table", "a bear [IMG] with a hat, " * 3]
CPU = torch.device("cpu")


def encoders(*, klein: bool, side: str):
    tokenizer = flux2_tokenizer(klein=klein)
    tokenizer.padding_side = side
    oracle = (oracle_qwen3 if klein else oracle_mistral)(len(tokenizer))
    oracle.load_state_dict(parity.draw_weights(parity.shapes_of(oracle)))
    return tokenizer, (qwen3_of if klein else mistral_of)(oracle), oracle


@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("model", ["dev", "klein"])
@torch.no_grad()
def test_equals_diffusers_with_padding(model: str, side: str) -> None:
    klein = model == "klein"
    tokenizer, ours, oracle = encoders(klein=klein, side=side)
    encode = Flux2KleinPipeline._get_qwen3_prompt_embeds if klein else Flux2Pipeline._get_mistral_3_small_prompt_embeds
    truth = encode(oracle, tokenizer, PROMPTS, hidden_states_layers=(1, 2, 3))
    embeds = encode_prompt(ours, tokenizer, prompt=PROMPTS, device=CPU)
    assert embeds.shape == (2, 512, 48)
    assert parity.relative_error(embeds, truth) <= parity.TOLERANCE


def test_the_hidden_states_are_those_of_the_published_models() -> None:
    assert prompt_layers(40) == (10, 20, 30)
    assert prompt_layers(36) == (9, 18, 27)


def test_the_texts_are_those_of_training() -> None:
    assert chat_text("an apple", mistral=False) == (
        "<|im_start|>user\nan apple<|im_end|>\n<|im_start|>assistant\n<think>\n\n</think>\n\n"
    )
    assert chat_text("an apple", mistral=True) == (
        f"<s>[SYSTEM_PROMPT]{SYSTEM_MESSAGE}[/SYSTEM_PROMPT][INST]an apple[/INST]"
    )


@pytest.mark.parametrize(("klein", "side"), [(True, "right"), (False, "left")])
@torch.no_grad()
def test_what_is_cut_is_logged(caplog, klein, side) -> None:
    tokenizer, ours, _ = encoders(klein=klein, side=side)
    with caplog.at_level(logging.WARNING):
        long = encode_prompt(ours, tokenizer, prompt="x" * 600 + "THE END", device=CPU)
    assert long.shape == (1, 512, 48)
    assert "is cut to 512" in caplog.text
    assert "THE END" in caplog.text
    caplog.clear()
    encode_prompt(ours, tokenizer, prompt="x" * 100, device=CPU)
    assert caplog.text == ""


def test_the_config_is_inferred_from_published_names() -> None:
    module = MistralTextEncoder(TINY_MISTRAL)
    shapes = {name: tuple(tensor.shape) for name, tensor in module.state_dict().items()}
    assert infer_mistral_config(shapes) == TINY_MISTRAL
    module.init_weights()
    with torch.no_grad():
        states = module(torch.arange(16)[None], layers=(0, 2))
    assert 0.3 < float(states.std()) < 10
