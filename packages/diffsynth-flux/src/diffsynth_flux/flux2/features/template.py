"""Outputs of template models: tokens after those of the prompt, and a LoRA of one call.

Each has a negative side, for the unconditional branch of classifier-free guidance. Their keys and values for the blocks
are a feature of core, `diffsynth.runtime.kv_cache`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, TypedDict

import torch
from jaxtyping import Float
from torch import Tensor

from diffsynth.core.lora import LoRA
from diffsynth.runtime.branch_lora import parse_branch_lora
from diffsynth.runtime.feature import Configs, Feature
from diffsynth.runtime.guidance import ignored_without_guidance
from diffsynth.runtime.unit import Phase, unit

LoRATensors = Mapping[str, Tensor] | None
"""The type of the argument `lora`: the tensors of a LoRA, by their names."""


class TemplateArguments(TypedDict, total=False):
    """Outputs of template models.

    Args:
        lora: Tensors of a LoRA of the transformer for this call, by the names of any usual file, such as
            `safetensors.torch.load_file` returns; `positive_only_lora` takes a path, too, in every pipeline.
        negative_lora: The same for the negative prompt.
        extra_text_embedding: Hidden states `1 s e` that follow those of the prompt.
        negative_extra_text_embedding: The same for the negative prompt.
    """

    lora: LoRATensors
    negative_lora: LoRATensors
    extra_text_embedding: Float[Tensor, "#b s e"] | None
    negative_extra_text_embedding: Float[Tensor, "#b s e"] | None


@unit("positive_only_lora", only_with="lora")
def add_lora(*, lora: LoRATensors = None, positive_only_lora: tuple[LoRA, ...] | None) -> tuple[LoRA, ...]:
    """Return the LoRAs of the conditional branch of guidance, a tuple: those of `positive_only_lora`, then `lora`."""
    return (*(positive_only_lora or ()), *(parse_branch_lora("lora", lora) or ()))


@unit("negative_only_lora", only_with="negative_lora", ignores=ignored_without_guidance("negative_lora"))
def add_negative_lora(
    *, negative_lora: LoRATensors = None, negative_only_lora: tuple[LoRA, ...] | None
) -> tuple[LoRA, ...]:
    """Return the LoRAs of the unconditional branch, a tuple: those of `negative_only_lora`, then `negative_lora`."""
    return (*(negative_only_lora or ()), *(parse_branch_lora("negative_lora", negative_lora) or ()))


@unit(
    "prompt_embeds",
    branches={"uncond": {"extra_text_embedding": "negative_extra_text_embedding"}},
    phase=Phase.CONDITION,
)
def append_text_embedding(
    *, prompt_embeds: Float[Tensor, "b t e"], extra_text_embedding: Float[Tensor, "#b s e"] | None = None
) -> Float[Tensor, "b t_and_s e"]:
    """Return the hidden states `b t_and_s e` of the prompts, followed by those that are given."""
    if extra_text_embedding is None:
        return prompt_embeds
    extra = extra_text_embedding.to(prompt_embeds).expand(len(prompt_embeds), -1, -1)
    return torch.cat((prompt_embeds, extra), dim=1)


def check(configs: Configs, values: Mapping[str, Any]) -> None:
    """Raise an error for outputs of templates that do not fit the transformer.

    Raises:
        ValueError: hidden states of another shape than the prompt's.
    """
    config = configs["dit"]
    if config is None:
        return
    for argument in ("extra_text_embedding", "negative_extra_text_embedding"):
        given = values[argument]
        if given is not None and (given.ndim != 3 or given.shape[2] != config.prompt_dim):
            raise ValueError(
                f"{argument} has the shape {tuple(given.shape)}; expected (1, tokens, {config.prompt_dim}), the width "
                "of the prompt's hidden states"
            )


TEMPLATE = Feature(
    "template",
    arguments=TemplateArguments,
    units=(add_lora, add_negative_lora, append_text_embedding),
    check=check,
)
