"""Parameters and buffers of a module by location, and the tensors that replace them while weights are offloaded."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from diffsynth.core.loader.reader.source import WeightSource
from diffsynth.core.vram.partition import Block

REST = ""
"""The name under which parameters outside blocks are listed; they stay on the device for the whole stage."""

Locations = list[tuple[nn.Module, str, str]]
"""Locations of parameters: the module, the name in it, and the first name in the whole module tree."""


def parameter_locations(module: nn.Module, blocks: Mapping[str, Block]) -> dict[str, Locations]:
    """Return a dict block name -> list of (module, name in it, full name) triples, one for each place of a parameter;
    key `REST`, the first, has those outside blocks.

    A parameter that is registered in two places is listed twice, under one name.
    """
    owner = {id(p): name for name, block in blocks.items() for p in block.module.parameters()}
    locations: dict[str, Locations] = {REST: [], **{name: [] for name in blocks}}
    names: dict[int, str] = {}
    for prefix, part in module.named_modules():
        for key, parameter in part._parameters.items():
            if parameter is not None:
                full = names.setdefault(id(parameter), f"{prefix}.{key}" if prefix else key)
                locations[owner.get(id(parameter), REST)].append((part, key, full))
    return locations


def buffers_of(module: nn.Module) -> Iterator[tuple[nn.Module, str, Tensor]]:
    """Yield a (module, name in it, buffer tensor) triple for each buffer of the module tree, except those on meta."""
    for part in module.modules():
        for key, buffer in list(part._buffers.items()):
            if buffer is not None and not buffer.is_meta:
                yield part, key, buffer


def read_buffers(module: nn.Module, source: WeightSource) -> None:
    """Replace those buffers of `module` that the file of `source` holds by the file's tensors, in place."""
    locations = {
        f"{prefix}.{key}" if prefix else key: (part, key)
        for prefix, part in module.named_modules()
        for key in part._buffers
    }
    found = source.read([name for name in source.keys if name in locations])
    for name, tensor in found.items():
        part, key = locations[name]
        part._buffers[key] = tensor


class UnloadedTensor(Tensor):
    """A weight that is in no memory. It has a shape, a dtype and a name; computing with it is an error.

    A plain tensor on meta would not do: torch multiplies one by a matrix with data, and returns whatever was in the
    memory of the result.
    """

    full_name: str

    @classmethod
    def __torch_function__(
        cls, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Raise RuntimeError if an argument of the operation `func` is a tensor with data; else run it and return its
        result.

        Raises:
            RuntimeError: an argument has data; the message names the weight.
        """
        tensors = [value for value in tree_leaves((args, kwargs)) if isinstance(value, Tensor)]
        if any(not isinstance(value, cls) and not value.is_meta for value in tensors):
            names = {value.full_name for value in tensors if isinstance(value, cls) and hasattr(value, "full_name")}
            raise RuntimeError(
                f"{' and '.join(sorted(names)) or 'a weight'} is read while its block does not run, so it is not "
                "loaded. Name the class of the module that reads it in `atomic`: then it is not cut"
            )
        return super().__torch_function__(func, types, args, kwargs or {})  # type: ignore[no-untyped-call]


def unloaded_parameters(tensors: Mapping[str, Tensor]) -> dict[str, nn.Parameter]:
    """Return a dict name -> frozen parameter of each meta tensor; using one with real data raises RuntimeError."""
    parameters = frozen_parameters({name: tensor.as_subclass(UnloadedTensor) for name, tensor in tensors.items()})
    for name, parameter in parameters.items():
        parameter.full_name = name  # type: ignore[attr-defined]
    return parameters


def frozen_parameters(tensors: Mapping[str, Tensor]) -> dict[str, nn.Parameter]:
    """Return a dict name -> `nn.Parameter` without gradient, made of the tensor of that name in `tensors` without a
    copy.
    """
    return {name: nn.Parameter(tensor, requires_grad=False) for name, tensor in tensors.items()}
