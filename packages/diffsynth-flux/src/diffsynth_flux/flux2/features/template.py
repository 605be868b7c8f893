"""Outputs of template models: keys and values for the blocks, tokens after those of the prompt, and a LoRA of one call.

Each has a negative side, for the unconditional branch of classifier-free guidance.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, TypedDict

import torch
from jaxtyping import Float
from torch import Tensor

from diffsynth.core.lora import LoRA
from diffsynth.errors import did_you_mean
from diffsynth.runtime.branch_lora import parse_branch_lora
from diffsynth.runtime.feature import Condition, Configs, Feature
from diffsynth.runtime.guidance import ignored_without_guidance
from diffsynth.runtime.unit import Phase, unit
from diffsynth_flux.flux2.config import Flux2DiTConfig
from diffsynth_flux.flux2.extension import BlockIndex, MoreKeysValues

KVCache = Mapping[str, tuple[Tensor, Tensor]] | None
"""The type of the argument `kv_cache`: "double_0", "single_0", ... -> keys and values."""

LoRATensors = Mapping[str, Tensor] | None
"""The type of the argument `lora`: the tensors of a LoRA, by their names."""


class TemplateArguments(TypedDict, total=False):
    """Outputs of template models.

    Args:
        kv_cache: Keys, after norm and RoPE, and values that blocks also attend to: a dict of "double_0", "double_1",
            ... and "single_0", ... to a tuple of two tensors `1 s n d`. Blocks that are not in it attend as before.
        negative_kv_cache: The same for the negative prompt.
        lora: Tensors of a LoRA of the transformer for this call, by the names of any usual file, such as
            `safetensors.torch.load_file` returns; `positive_only_lora` takes a path, too, in every pipeline.
        negative_lora: The same for the negative prompt.
        extra_text_embedding: Hidden states `1 s e` that follow those of the prompt.
        negative_extra_text_embedding: The same for the negative prompt.
    """

    kv_cache: KVCache
    negative_kv_cache: KVCache
    lora: LoRATensors
    negative_lora: LoRATensors
    extra_text_embedding: Float[Tensor, "#b s e"] | None
    negative_extra_text_embedding: Float[Tensor, "#b s e"] | None


@unit("template_keys_values", branches={"uncond": {"kv_cache": "negative_kv_cache"}}, phase=Phase.CONDITION)
def read_kv_cache(*, kv_cache: KVCache = None, device: torch.device, dtype: torch.dtype) -> MoreKeysValues | None:
    """Return `MoreKeysValues` with the given keys and values; None without."""
    if kv_cache is None:
        return None
    return MoreKeysValues(
        {block_of(name): tuple(x.to(device, dtype) for x in keys_values) for name, keys_values in kv_cache.items()}
    )


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


def block_of(name: str) -> BlockIndex:
    """Return the (stack, index) of a block that `kv_cache` names, such as "double_0" or "single_12".

    Raises:
        ValueError: a name of another form.
    """
    kind, _, index = name.partition("_")
    if kind == "double" and index.isdecimal():
        return "transformer_blocks", int(index)
    if kind == "single" and index.isdecimal():
        return "single_transformer_blocks", int(index)
    raise ValueError(f"kv_cache has the name {name!r}; expected 'double_0', 'double_1', ... or 'single_0', ...")


def check(configs: Configs, values: Mapping[str, Any]) -> None:
    """Raise an error for outputs of templates that do not fit the transformer.

    Raises:
        TypeError: keys and values that are no two tensors.
        ValueError: a block that the transformer does not have, or tensors of another shape.
    """
    config = configs["dit"]
    if config is None:
        return
    for argument in ("kv_cache", "negative_kv_cache"):
        for name, keys_values in (values[argument] or {}).items():
            _check_keys_values(argument, name, keys_values, config)
    for argument in ("extra_text_embedding", "negative_extra_text_embedding"):
        given = values[argument]
        if given is not None and (given.ndim != 3 or given.shape[2] != config.prompt_dim):
            raise ValueError(
                f"{argument} has the shape {tuple(given.shape)}; expected (1, tokens, {config.prompt_dim}), the width "
                "of the prompt's hidden states"
            )


def _check_keys_values(argument: str, name: str, keys_values: Any, config: Flux2DiTConfig) -> None:
    names = [f"double_{index}" for index in range(config.n_layers)]
    names += [f"single_{index}" for index in range(config.n_single_layers)]
    if name not in names:
        raise ValueError(
            f"{argument} has {name!r}, and this transformer has double_0 to double_{config.n_layers - 1} and single_0 "
            f"to single_{config.n_single_layers - 1}{did_you_mean(name, names)}"
        )
    if not isinstance(keys_values, list | tuple) or [type(x) for x in keys_values] != [Tensor, Tensor]:
        raise TypeError(f"{argument}[{name!r}] is {type(keys_values).__name__}; expected a tuple of two tensors")
    shapes = [tuple(x.shape) for x in keys_values]
    heads = (config.n_heads, config.head_dim)
    if any(len(shape) != 4 or shape[2:] != heads for shape in shapes) or shapes[0] != shapes[1]:
        raise ValueError(
            f"{argument}[{name!r}] has the shapes {shapes[0]} and {shapes[1]}; expected two of (1, tokens, {heads[0]}, "
            f"{heads[1]})"
        )


TEMPLATE = Feature(
    "template",
    arguments=TemplateArguments,
    units=(read_kv_cache, add_lora, add_negative_lora, append_text_embedding),
    conditions={"template_keys_values": Condition("an image has no frames", batch="separate")},
    check=check,
)
