"""Weights of the words of prompts, held to loops over the tokens."""

from __future__ import annotations

import importlib
from typing import Any

import pytest
import torch
from torch import nn

import flux1_oracles
import flux2_oracles
import qwen_image_oracles
import wan_oracles
import z_image_oracles
from diffsynth.errors import Refused
from diffsynth.runtime.prompt_weights import (
    WeightedText,
    check_prompt_weights,
    encode_weighted,
    parse_weights,
    tokenize_weighted,
    weighted_texts,
)
from diffsynth.testing.tiny_processors import byte_tokenizer

PROMPT = "a (red:1.5) cat on a (big (wooden:0.5) table) at \\(noon\\)"
TEXT = "a red cat on a big wooden table at (noon)"
WORDS = {"red": 1.5, "big ": 1.1, "wooden": 1.1 * 0.5, " table": 1.1}


@pytest.mark.parametrize(
    ("prompt", "text", "weights"),
    [
        ("a cat", "a cat", ()),
        ("a (cat)", "a cat", ((2, 5, 1.1),)),
        ("((cat))", "cat", ((0, 3, 1.1 * 1.1),)),
        ("(cat:1.4)", "cat", ((0, 3, 1.4),)),
        ("(cat: -0.5 )s", "cats", ((0, 3, -0.5),)),
        ("(cat:0)", "cat", ((0, 3, 0.0),)),
        ("(cat:1)", "cat", ()),
        ("a: (b: c)", "a: b: c", ((3, 7, 1.1),)),
        ("(smile :)", "smile :", ((0, 7, 1.1),)),
        ("[cat] {x}", "[cat] {x}", ()),
        (r"\(cat\) \\ \n", "(cat) \\ \\n", ()),
        ("(a(b:2)c:3)", "abc", ((0, 1, 3.0), (1, 2, 6.0), (2, 3, 3.0))),
        ("()", "", ()),
    ],
)
def test_brackets_are_weights(prompt: str, text: str, weights: tuple[Any, ...]) -> None:
    assert parse_weights(prompt) == WeightedText(text, weights)


@pytest.mark.parametrize(
    ("prompt", "message"),
    [
        ("a (cat", "character 3 opens a bracket that is not closed. Write"),
        ("cat) a", "character 4 closes a bracket that was not opened"),
        ("cat:1.2)", "character 8 closes a bracket"),
        ("(cat:1,4)", "the weight '1,4' is no finite number"),
        ("(cat:1.2.3)", "the weight '1.2.3'"),
        ("(cat:" + "9" * 400 + ")", "is no finite number"),
        (f"((a:{10**200}):{10**200})", "the product of the weights is too large"),
    ],
)
def test_markup_that_is_none_is_refused(prompt: str, message: str) -> None:
    with pytest.raises(ValueError, match=message.replace("(", r"\(")):
        parse_weights(prompt)
    with pytest.raises(ValueError, match=message.replace("(", r"\(")):
        check_prompt_weights({"prompt": ["a", prompt], "prompt_weighting": True})
    with pytest.raises(ValueError, match=message.replace("(", r"\(")):
        check_prompt_weights({"prompt": "a", "negative_prompt": prompt, "prompt_weighting": True})
    check_prompt_weights({"prompt": prompt, "negative_prompt": prompt, "prompt_weighting": False})


def test_deep_brackets_take_no_recursion() -> None:
    parsed = parse_weights("(" * 5000 + "a" + ":1)" * 5000)
    assert parsed == WeightedText("a")


def test_without_prompt_weighting_brackets_are_text() -> None:
    assert weighted_texts(["(a:1.4)"], prompt_weighting=False, max_tokens=8) == [WeightedText("(a:1.4)")]
    assert weighted_texts(["(a:1.4)"], prompt_weighting=True, max_tokens=8) == [WeightedText("a", ((0, 1, 1.4),))]


def test_a_template_moves_the_weights() -> None:
    text = parse_weights("(cat:2)").within(lambda text: f"<user>{text}</user>")
    assert text == WeightedText("<user>cat</user>", ((6, 9, 2.0),))


def test_tokens_have_the_weights_of_their_characters() -> None:
    tokens, weights = tokenize_weighted(
        byte_tokenizer(), [parse_weights("a (b\u00e9:2)"), WeightedText("a")], padding="longest", padding_side="right"
    )
    assert weights.tolist() == [[1, 1, 2, 2, 2], [1, 1, 1, 1, 1]]  # the accented letter has two bytes
    assert tokens["input_ids"].shape == (2, 5)
    assert tokenize_weighted(byte_tokenizer(), [WeightedText("a")])[1] is None


def test_a_tokenizer_without_characters_is_refused() -> None:
    class Slow:
        is_fast = False

    with pytest.raises(Refused, match="Slow does not say which characters"):
        tokenize_weighted(Slow(), [parse_weights("(a:2)")])


def test_states_are_scaled_from_those_without_the_words() -> None:
    ids, weights = torch.tensor([[4, 5, 6]]), torch.tensor([[1.0, 3.0, 0.0]])
    states = encode_weighted(lambda ids: ids[..., None].float(), ids, weights, padding=1)
    assert states[0, :, 0].tolist() == [4, 1 + 3 * (5 - 1), 1]
    assert encode_weighted(lambda ids: ids[..., None].float(), ids, None, padding=1)[0, :, 0].tolist() == [4, 5, 6]


class Naive(nn.Module):
    """A text encoder that finds the words in the token ids, and scales their states one by one."""

    def __init__(self, encoder: nn.Module, tokenizer: Any) -> None:
        super().__init__()
        self.encoder, self.tokenizer = encoder, tokenizer
        self.config = encoder.config

    def forward(self, input_ids: torch.Tensor, *masks: Any, **options: Any) -> torch.Tensor:
        row, found = input_ids[0].tolist(), {}
        prompt = self.place(row, TEXT, 0)[0]
        for word, weight in WORDS.items():
            found |= dict.fromkeys(self.place(row, word, prompt), weight)
        cut = [self.tokenizer.pad_token_id if i in found else token for i, token in enumerate(row)]
        states = self.encoder(input_ids, *masks, **options)
        without = self.encoder(torch.tensor([cut]), *masks, **options)
        for i, weight in found.items():
            for channel in range(states.shape[-1]):
                start = without[0, i, channel].clone()
                states[0, i, channel] = start + weight * (states[0, i, channel] - start)
        return states

    def place(self, row: list[int], text: str, begin: int) -> range:
        """Return the indices of the tokens of a text."""
        ids = self.tokenizer(text, add_special_tokens=False)["input_ids"]
        first = next(i for i in range(begin, len(row)) if row[i : i + len(ids)] == ids)
        return range(first, first + len(ids))


def text_parts(family: str) -> tuple[Any, nn.Module, Any, dict[str, Any]]:
    """Return (the unit that encodes prompts, text encoder, tokenizer, further arguments) of a tiny model."""
    if family == "wan":
        from diffsynth_wan.tiny import tiny_tokenizer
        from diffsynth_wan.units.prompt import encode_prompt

        return encode_prompt, wan_oracles.our_text_encoder(wan_oracles.oracle_text_encoder()), tiny_tokenizer(), {}
    if family.startswith("flux2"):
        from diffsynth_flux.flux2.units import encode_prompt

        klein = family == "flux2-klein"
        tokenizer = flux2_oracles.flux2_tokenizer(klein=klein)
        oracle = (flux2_oracles.oracle_qwen3 if klein else flux2_oracles.oracle_mistral)(len(tokenizer))
        return encode_prompt, (flux2_oracles.qwen3_of if klein else flux2_oracles.mistral_of)(oracle), tokenizer, {}
    oracles = {"flux1": flux1_oracles, "qwen_image": qwen_image_oracles, "z_image": z_image_oracles}[family]
    pipe, _ = oracles.tiny_pipelines()
    module = {"flux1": "diffsynth_flux.flux1", "qwen_image": "diffsynth_qwen_image", "z_image": "diffsynth_zimage"}
    unit = importlib.import_module(f"{module[family]}.units").encode_prompt
    number = "_2" if family == "flux1" else ""
    further = {"dtype": torch.float32} if family == "qwen_image" else {}
    return unit, getattr(pipe, f"text_encoder{number}"), getattr(pipe, f"tokenizer{number}"), further


@pytest.mark.parametrize("family", ["flux1", "flux2-dev", "flux2-klein", "qwen_image", "wan", "z_image"])
@torch.no_grad()
def test_every_family_scales_the_states_of_the_words(family: str) -> None:
    unit, encoder, tokenizer, further = text_parts(family)

    def encode(encoder: nn.Module, prompt: Any, **options: Any) -> torch.Tensor:
        made = unit.function(encoder, tokenizer, prompt=prompt, device=torch.device("cpu"), **further, **options)
        return made[0] if isinstance(made, tuple) else made

    plain = encode(encoder, TEXT)
    weighted = encode(encoder, PROMPT, prompt_weighting=True)
    expected = encode(Naive(encoder, tokenizer), TEXT)
    assert weighted.shape == plain.shape
    assert not torch.equal(weighted, plain)
    torch.testing.assert_close(weighted, expected, rtol=1e-5, atol=1e-6)
    neutral = TEXT.replace("(", "\\(").replace(")", "\\)").replace("red", "(red:1)")
    assert torch.equal(encode(encoder, neutral, prompt_weighting=True), plain)
    both = encode(encoder, [neutral, PROMPT], prompt_weighting=True)
    torch.testing.assert_close(both[0], plain[0], rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(both[1], weighted[0], rtol=1e-5, atol=1e-6)


def test_a_call_reads_weights_on_request() -> None:
    pipe, _ = z_image_oracles.tiny_pipelines()
    call = {"height": 32, "width": 32, "num_inference_steps": 1, "seed": 0, "output_type": "latents", "cfg_scale": 2}

    def latents(prompt: str, negative: str = "", **options: Any) -> torch.Tensor:
        return pipe(prompt, negative_prompt=negative, **call, **options)

    plain = latents("a red cat", "a dog")
    assert torch.equal(latents("a red cat", "a dog", prompt_weighting=True), plain)
    assert not torch.equal(latents("a (red:1.5) cat", "a dog", prompt_weighting=True), plain)
    assert not torch.equal(latents("a red cat", "a (dog:1.5)", prompt_weighting=True), plain)
    assert not torch.equal(
        latents("a (red:1.5) cat", "a dog"), latents("a (red:1.5) cat", "a dog", prompt_weighting=True)
    )
    with pytest.raises(ValueError, match="opens a bracket that is not closed"):
        pipe.check(prompt="a cat", negative_prompt="(dog", prompt_weighting=True, cfg_scale=2)
    assert "prompt_weighting" in pipe.schema()["properties"]
