"""Keys and values as arguments of a call, which the template models of DiffSynth-Studio return.

A pipeline lists the feature `kv_cache_feature(...)`. Its network takes the extension
`diffsynth.models.keys_values.MoreKeysValues`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, TypedDict

import torch
from torch import Tensor

from diffsynth.errors import did_you_mean
from diffsynth.models.keys_values import MoreKeysValues
from diffsynth.runtime.feature import Condition, Configs, Feature
from diffsynth.runtime.unit import Phase, Unit, unit

KVCache = Mapping[str, tuple[Tensor, Tensor]] | None
"""The type of the argument `kv_cache`: name of a block, "block_0" -> keys and values."""


class KVCacheArguments(TypedDict, total=False):
    """Keys and values that blocks of the network also attend to.

    Args:
        kv_cache: Keys, after norm and RoPE, and values that blocks also attend to: a dict of a block's name, a word of
            the network's and its index, to a tuple of two tensors `1 s n d`. Blocks that are not in it attend as
            before.
        negative_kv_cache: The same for the negative prompt.
    """

    kv_cache: KVCache
    negative_kv_cache: KVCache


def kv_cache_feature(stacks: Mapping[str, tuple[str, str]], *, role: str = "dit") -> Feature:
    """Return a `Feature` with the arguments `kv_cache` and `negative_kv_cache`, for image pipelines.

    Args:
        stacks: word in the names of blocks -> (the network's attribute that is their stack, field of its config that is
            their number): `{"block": ("blocks", "n_layers")}` for blocks "block_0", "block_1", ...
        role: of the network, whose config has the fields `n_heads` and `head_dim`.
    """

    def check(configs: Configs, values: Mapping[str, Any]) -> None:
        config = configs[role]
        if config is None:
            return
        counts = {word: getattr(config, field) for word, (_, field) in stacks.items()}
        for argument in ("kv_cache", "negative_kv_cache"):
            for name, keys_values in (values[argument] or {}).items():
                heads = (config.n_heads, config.head_dim)
                check_keys_values(argument, name, keys_values, counts, heads, batch_size=values["batch_size"])

    return Feature(
        "kv_cache",
        arguments=KVCacheArguments,
        units=(_reader({word: stack for word, (stack, _) in stacks.items()}),),
        conditions={"more_keys_values": Condition("an image has no frames", batch="separate")},
        check=check,
    )


def check_keys_values(
    argument: str,
    name: str,
    keys_values: Any,
    counts: Mapping[str, int],
    heads: tuple[int, int],
    *,
    batch_size: int = 1,
) -> None:
    """Raise an error for an entry of a cache that does not fit a network.

    Args:
        argument: name of the argument, for messages.
        name: of the entry.
        keys_values: its value.
        counts: word in the names of blocks -> number of the blocks.
        heads: number of heads and their dimension.
        batch_size: number of results of the call.

    Raises:
        TypeError: a value that is no two tensors of floating-point numbers.
        ValueError: a block that the network does not have, or tensors of another shape.
    """
    names = [f"{word}_{index}" for word, count in counts.items() for index in range(count)]
    if name not in names:
        known = " and ".join(f"{word}_0 to {word}_{count - 1}" for word, count in counts.items())
        raise ValueError(f"{argument} has {name!r}, and this network has {known}{did_you_mean(str(name), names)}")
    if not isinstance(keys_values, list | tuple) or [type(x) for x in keys_values] != [Tensor, Tensor]:
        raise TypeError(f"{argument}[{name!r}] is {type(keys_values).__name__}; expected a tuple of two tensors")
    dtypes, shapes = [x.dtype for x in keys_values], [tuple(x.shape) for x in keys_values]
    if not all(dtype.is_floating_point for dtype in dtypes):
        raise TypeError(f"{argument}[{name!r}] has the dtypes {dtypes[0]}, {dtypes[1]}; expected floating-point ones")
    fit = (len(shape) == 4 and shape[0] in (1, batch_size) and shape[2:] == heads for shape in shapes)
    if not all(fit) or shapes[0] != shapes[1]:
        raise ValueError(
            f"{argument}[{name!r}] has the shapes {shapes[0]} and {shapes[1]}; expected two of (1, tokens, {heads[0]}, "
            f"{heads[1]}), or with one item for each of {batch_size} results"
        )


def _reader(stacks: Mapping[str, str]) -> Unit:
    """Return the `Unit` that makes an extension of the arguments; `stacks` leads from words to the network's stacks."""

    @unit("more_keys_values", branches={"uncond": {"kv_cache": "negative_kv_cache"}}, phase=Phase.CONDITION)
    def read_kv_cache(*, kv_cache: KVCache = None, device: torch.device, dtype: torch.dtype) -> MoreKeysValues | None:
        """Return `MoreKeysValues` with the given keys and values; None without."""
        if kv_cache is None:
            return None
        blocks = {}
        for name, keys_values in kv_cache.items():
            word, _, index = name.rpartition("_")
            blocks[stacks[word], int(index)] = tuple(x.to(device, dtype) for x in keys_values)
        return MoreKeysValues(blocks)

    return read_kv_cache
