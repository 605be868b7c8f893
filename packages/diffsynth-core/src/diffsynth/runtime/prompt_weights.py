"""Weights of the words of a prompt: `(word:1.4)`, read where a call has `prompt_weighting=True`.

A weight scales what a word adds to the hidden states of the text encoder: with the states `with_word` of the prompt and
`without` of the prompt in which padding stands in place of the weighted words, the states of the tokens of a word of
weight w are `without + w * (with_word - without)`. A scale of the states themselves would change nothing where a
network normalizes each token, as Z-Image and Qwen-Image do. Pooled states have no tokens, and take no weights.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from diffsynth.errors import Refused, shown
from diffsynth.runtime.prompts import cut_prompt

BRACKETS_WEIGHT = 1.1
"""Weight of `(word)`, which states none."""

_MARKUP = re.compile(r"\\(?P<escaped>[()\\])|(?P<open>\()|(?P<close>(?::[ ]*(?P<weight>[-+.,]*\d[-+.,\d]*)[ ]*)?\))")
_NOT_IN_A_PROMPT = "\0"


@dataclass(frozen=True)
class WeightedText:
    """A text, and the weights of parts of it.

    Args:
        text: without the brackets and numbers of weights.
        weights: (first character, character after the last, weight) of each part whose weight is not 1, in order.
    """

    text: str
    weights: tuple[tuple[int, int, float], ...] = ()

    def within(self, template: Callable[[str], str]) -> WeightedText:
        """Return the `WeightedText` of `template(text)`, in which the text stands once and unchanged."""
        begin = template(_NOT_IN_A_PROMPT).index(_NOT_IN_A_PROMPT)
        moved = tuple((begin + first, begin + end, weight) for first, end, weight in self.weights)
        return WeightedText(template(self.text), moved)


def parse_weights(prompt: str) -> WeightedText:
    r"""Return the `WeightedText` of a prompt: `(word:1.4)` has weight 1.4, `(word)` 1.1; weights of brackets in
    brackets are multiplied, and `\(`, `\)` and `\\` are the characters themselves. A colon without a number is text.

    Square brackets are text. A weight is any finite number: 0 takes out what the word adds, a negative one reverses it.

    Raises:
        ValueError: a bracket without its counterpart, or a weight that is no finite number.
    """
    pieces: list[str] = []
    depths: list[int] = []  # for each piece, the number of the innermost bracket around it, -1 for none
    factors: list[float] = []
    outer: list[int] = []  # for each bracket, the number of the bracket around it
    starts: list[int] = []
    inner, end = -1, 0
    for found in _MARKUP.finditer(prompt):
        pieces.append(prompt[end : found.start()] + (found["escaped"] or ""))
        depths.append(inner)
        end = found.end()
        if found["open"]:
            outer.append(inner)
            starts.append(found.start())
            factors.append(BRACKETS_WEIGHT)
            inner = len(factors) - 1
        elif found["close"]:
            if inner < 0:
                raise ValueError(f"prompt {shown(prompt)}: character {end} closes a bracket that was not opened{_HINT}")
            if found["weight"]:
                factors[inner] = _weight(found["weight"], prompt)
            inner = outer[inner]
    if inner >= 0:
        raise ValueError(
            f"prompt {shown(prompt)}: character {starts[inner] + 1} opens a bracket that is not closed{_HINT}"
        )
    return _weighted([*pieces, prompt[end:]], [*depths, -1], _products(factors, outer, prompt))


_HINT = r". Write \( and \) for brackets that are part of the text"


def _weight(text: str, prompt: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not math.isfinite(value):
        raise ValueError(
            f"prompt {shown(prompt)}: the weight {shown(text)} is no finite number; expected one as in (word:1.4)"
        )
    return value


def _products(factors: Sequence[float], outer: Sequence[int], prompt: str) -> list[float]:
    products: list[float] = []
    for factor, around in zip(factors, outer, strict=True):
        products.append(factor * (products[around] if around >= 0 else 1.0))
        if not math.isfinite(products[-1]):
            raise ValueError(f"prompt {shown(prompt)}: the product of the weights is too large")
    return products


def _weighted(pieces: Sequence[str], depths: Sequence[int], products: Sequence[float]) -> WeightedText:
    weights, begin = [], 0
    for piece, depth in zip(pieces, depths, strict=True):
        if piece and depth >= 0 and products[depth] != 1:
            weights.append((begin, begin + len(piece), products[depth]))
        begin += len(piece)
    return WeightedText("".join(pieces), tuple(weights))


def weighted_texts(prompts: Sequence[str], *, prompt_weighting: bool, max_tokens: int) -> list[WeightedText]:
    """Return a list of `WeightedText`s of prompts: by `parse_weights`, or without `prompt_weighting` the prompts as
    they are; each is cut by `cut_prompt`.

    Args:
        prompts: one or more.
        prompt_weighting: whether brackets are weights.
        max_tokens: number of tokens that the text encoder takes.

    Raises:
        ValueError: see `parse_weights`.
    """
    texts = [parse_weights(text) if prompt_weighting else WeightedText(text) for text in prompts]
    return [replace(text, text=cut_prompt(text.text, max_tokens=max_tokens)) for text in texts]


def check_prompt_weights(values: Mapping[str, Any]) -> None:
    """Raise ValueError for a prompt or negative prompt of a call with `prompt_weighting` that `parse_weights`
    refuses.
    """
    for name in ("prompt", "negative_prompt") if values["prompt_weighting"] else ():
        prompts = values.get(name) or ()
        for text in [prompts] if isinstance(prompts, str) else prompts:
            parse_weights(text)


def tokenize_weighted(
    tokenizer: Any, texts: Sequence[WeightedText], **options: Any
) -> tuple[Mapping[str, Tensor], Float[Tensor, "b s"] | None]:
    """Return (what the tokenizer returns for the texts; the weight of each token, a CPU tensor, or None if all are 1).

    A token of characters with several weights has the last of them.

    Args:
        tokenizer: of transformers.
        texts: one or more.
        options: arguments of the tokenizer.

    Raises:
        Refused: there are weights, and the tokenizer does not say which characters a token is of.
    """
    has_weights = any(text.weights for text in texts)
    if has_weights and not getattr(tokenizer, "is_fast", False):
        raise Refused(
            f"prompt_weighting: {type(tokenizer).__name__} does not say which characters a token is of; use the "
            "tokenizer of the same model with a tokenizer.json"
        )
    extra = {"return_offsets_mapping": True} if has_weights else {}
    tokens = tokenizer([text.text for text in texts], return_tensors="pt", **options, **extra)
    if not has_weights:
        return tokens, None
    offsets = tokens["offset_mapping"]
    rows = tokens.get("overflow_to_sample_mapping", range(len(texts)))  # a text that was cut has several rows
    return tokens, torch.stack([_token_weights(offsets[i], texts[int(of)]) for i, of in enumerate(rows)])


def _token_weights(offsets: Int[Tensor, "s 2"], text: WeightedText) -> Float[Tensor, "s"]:
    weights = torch.ones(len(offsets))
    for first, end, weight in text.weights:
        weights[(offsets[:, 0] < end) & (offsets[:, 1] > first)] = weight
    return weights


def encode_weighted(
    encode: Callable[[Int[Tensor, "b s"]], Float[Tensor, "b s e"]],
    input_ids: Int[Tensor, "b s"],
    weights: Float[Tensor, "b s"] | None,
    *,
    padding: int,
) -> Float[Tensor, "b s e"]:
    """Return the hidden states `b s e` of tokens, those of weighted tokens scaled as the module's docstring says.

    Args:
        encode: function of token ids that returns the hidden states; it is called twice if there are weights.
        input_ids: on the device of `encode`.
        weights: of the tokens, on any device; None if all are 1.
        padding: token id that stands in place of weighted tokens.
    """
    states = encode(input_ids)
    if weights is None:
        return states
    weights = weights.to(input_ids.device)
    is_weighted = weights != 1
    without = encode(torch.where(is_weighted, padding, input_ids))
    scaled = without + weights[..., None].to(states.dtype) * (states - without)
    return torch.where(is_weighted[..., None], scaled, states)
