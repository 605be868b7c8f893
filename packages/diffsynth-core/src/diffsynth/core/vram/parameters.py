"""Where the parameters and buffers of a module stand, and how others are put in their place."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from diffsynth.core.loader.reader.source import ComponentSource
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


class UnloadedTensor(Tensor):
    """A weight that is in no memory now. It has a shape, a dtype and a name; to compute with it is an error.

    A plain tensor on meta would not do: torch multiplies one by a matrix that is there, and gives whatever was in the
    memory of the result.
    """

    full_name: str

    @classmethod
    def __torch_function__(
        cls, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Refuses to have it together with tensors that are there.

        Raises:
            RuntimeError: always then.
        """
        tensors = [value for value in tree_leaves((args, kwargs)) if isinstance(value, Tensor)]
        there = [value for value in tensors if not isinstance(value, cls)]
        if any(not value.is_meta for value in there):
            names = {value.full_name for value in tensors if isinstance(value, cls) and hasattr(value, "full_name")}
            raise RuntimeError(
                f"{' and '.join(sorted(names)) or 'a weight'} is read while its block does not run, so it is not "
                "there. Name the class of the module that reads it in `atomic`: then it is not cut"
            )
        return super().__torch_function__(func, types, args, kwargs or {})


def away(tensors: dict[str, Tensor]) -> dict[str, nn.Parameter]:
    """Tensors on meta as parameters that nobody can compute with."""
    parameters = frozen({name: tensor.as_subclass(UnloadedTensor) for name, tensor in tensors.items()})
    for name, parameter in parameters.items():
        parameter.full_name = name  # type: ignore[attr-defined]
    return parameters


def frozen(views: dict[str, Tensor]) -> dict[str, nn.Parameter]:
    """Tensors as parameters that do not learn."""
    return {name: nn.Parameter(view, requires_grad=False) for name, view in views.items()}
