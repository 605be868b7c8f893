"""Where the parameters and buffers of a module stand, and how others are put in their place."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from typing import Any

from torch import Tensor, nn

from diffsynth.core.loader.reading.source import ComponentSource
from diffsynth.core.vram.partition import Block

REST = ""
"""The name of what is outside blocks; it comes first and stays for the whole stage."""

Places = list[tuple[nn.Module, str, str]]
"""Where a parameter stands: its module, its name there, and the first name it has in the whole."""


def places_of(module: nn.Module, blocks: dict[str, Block]) -> dict[str, Places]:
    """By block; a parameter that stands in two places has one name."""
    owner = {id(p): name for name, block in blocks.items() for p in block.module.parameters()}
    places: dict[str, Places] = {REST: [], **{name: [] for name in blocks}}
    names: dict[int, str] = {}
    for prefix, part in module.named_modules():
        for key, parameter in part._parameters.items():
            if parameter is not None:
                full = names.setdefault(id(parameter), f"{prefix}.{key}" if prefix else key)
                places[owner.get(id(parameter), REST)].append((part, key, full))
    return places


def buffers_of(module: nn.Module) -> Iterator[tuple[nn.Module, str, Tensor]]:
    """Each buffer with its module and its name there; those on meta are nobody's yet."""
    for part in module.modules():
        for key, buffer in list(part._buffers.items()):
            if buffer is not None and not buffer.is_meta:
                yield part, key, buffer


def read_buffers(module: nn.Module, source: ComponentSource) -> None:
    """Put the buffers that a file holds in their place."""
    places = {
        f"{prefix}.{key}" if prefix else key: (part, key)
        for prefix, part in module.named_modules()
        for key in part._buffers
    }
    found = source.read([name for name in source.keys if name in places])
    for name, tensor in found.items():
        part, key = places[name]
        part._buffers[key] = tensor


def surround(module: nn.Module, around: Callable[..., Any]) -> None:
    """Have `around(forward, ...)` called in place of `forward(...)`, on this instance."""
    inner = module.forward

    @functools.wraps(inner)
    def forward(*args: Any, **kwargs: Any) -> Any:
        return around(forward.__wrapped__, *args, **kwargs)  # type: ignore[attr-defined]

    vars(module)["forward"] = forward


def frozen(views: dict[str, Tensor]) -> dict[str, nn.Parameter]:
    """Tensors as parameters that do not learn."""
    return {name: nn.Parameter(view, requires_grad=False) for name, view in views.items()}
